"""How fast is a whole fine-tuning, ours beside TRL's with peft? LoRA on all linear layers of the LLaMA.

`language` (its LightningModule and its data module through Lightning's Trainer) and TRL's SFTTrainer with peft read the
same directory of weights and the same generated rows of prompt and answer, whose tokens are bytes, all of one length.
Both learn the answers, clip the gradient at 1, and take the same AdamW, rate and number of steps; weights are bfloat16
under bfloat16 autocast, and nothing is logged or checkpointed. TRL always measures entropy and accuracy of each
batch as well. Two trainings of each, in turns in one process, from loading the model to saving the adapter.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lit_adapters as la
from benchmarks.against_peft import TARGETS
from benchmarks.gpu.models import RANK, llama
from benchmarks.gpu.setting import Record, Setting, attempt
from benchmarks.timing import ratios, spread

ORDER = ("ours", "trl", "trl", "ours")
RATE = 1e-4
CLIP = 1.0


class Clock:
    """Notes when each step of a training begins, and the tokens that it reads.

    Attributes:
        starts: Seconds at which a forward pass began, the device idle.
        tokens: Tokens of that pass, padding included.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.starts: list[float] = []
        self.tokens: list[int] = []

    def watch(self, model: nn.Module) -> None:
        """Note every call of a model."""
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.starts.append(self.setting.now())
        self.tokens.append(named["input_ids"].numel())


def fits(setting: Setting) -> Iterator[Record]:
    """One record for each training, then one that compares the libraries."""
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(setting, Path(folder))
        for number, library in enumerate(ORDER):
            found = attempt({"library": library, "run": number}, partial(fit, setting, library, Path(folder)))
            if "error" not in found:
                runs.setdefault(library, []).extend(found.pop("steps_seconds"))
            yield found
    if len(runs) == 2:
        yield {"library": "ours", "what": "ratio", "over_trl": ratios(runs, "ours", "trl")}


def shape(setting: Setting) -> tuple[int, int, int, int]:
    """Rows of a batch, tokens of a row, steps, and steps at the beginning that are not counted."""
    return setting.choose((4, 1024, 30, 5), (2, 32, 5, 1))


def prepare(setting: Setting, folder: Path) -> None:
    """Write weights, tokenizer and rows."""
    from language.models import TINY_LLAMA, create_tokenizer

    llama(setting).save_pretrained(folder / "model")
    create_tokenizer(TINY_LLAMA).save_pretrained(folder / "model")
    rows, tokens, steps, _ = shape(setting)
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    half = tokens // 2
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows * steps):
            # A line break follows the prompt, and the end token the answer.
            prompt, answer = ("".join(draw.choices(letters, k=half - 1)) for _ in range(2))
            print(json.dumps({"prompt": prompt, "response": answer}), file=file)


def fit(setting: Setting, library: str, folder: Path) -> Record:
    """Train once; seconds of all of it and of each step, tokens and memory."""
    setting.forget_peak()
    torch.manual_seed(0)
    clock = Clock(setting)
    begin = time.perf_counter()
    train: Callable[[Setting, Clock, Path], None] = ours if library == "ours" else trl
    train(setting, clock, folder)
    whole = setting.now() - begin
    rows, _, steps, warm = shape(setting)
    if len(clock.starts) != steps:
        raise RuntimeError(f"{len(clock.starts)} steps ran, not {steps}")
    seconds = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)][warm:]
    return {
        "steps_seconds": seconds,
        "step": spread(seconds),
        "tokens_a_step": clock.tokens[-1],
        "tokens_a_second": clock.tokens[-1] / spread(seconds)["median"],
        "whole_seconds": whole,
        "rows": rows,
        "steps": steps,
        **setting.peak(),
    }


def ours(setting: Setting, clock: Clock, folder: Path) -> None:
    """Train with `language`."""
    import lightning

    from language.data.module import InstructionDataModule
    from language.module import CausalLMTuner

    class Tuner(CausalLMTuner):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            clock.watch(pl_module.model)

    rows, tokens, steps, _ = shape(setting)
    name = str(folder / "model")
    data = InstructionDataModule(
        str(folder / "rows.jsonl"), name, format="pairs", max_length=tokens, batch_size=rows, val_fraction=0.0
    )
    tuner = Tuner(name, la.LoRA(rank=RANK, targets=TARGETS["llama"]), dtype="bfloat16")
    trainer = lightning.Trainer(
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[Watch()],
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tuner, data)
    assert tuner.model is not None
    la.save_adapters(tuner.model, folder / "ours")


def trl(setting: Setting, clock: Clock, folder: Path) -> None:
    """Train with TRL and peft."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows, tokens, steps, _ = shape(setting)
    name = str(folder / "model")
    read = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    arguments = SFTConfig(
        str(folder / "trl"),
        max_length=tokens,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=setting.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16),
        arguments,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"] + "\n", "completion": r["response"]} for r in read]),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"),
    )
    clock.watch(trainer.model)
    trainer.train()
    trainer.save_model(str(folder / "peft"))
