"""What do the methods learn from a reward? SmolLM2-135M on arithmetic by the recipe configs/language/smollm2/grpo.yaml.

    python -m benchmarks.reinforcement [--arms lora afa ...] [--threads 1]

The prompt ends after "15 + 4 ="; the reward is 1 for the right number and 0.5 for nothing but a number. Each of 100
steps samples 8 completions of at most 8 tokens for each of 4 questions, at temperature 1, and AdamW learns from them.
Before and after, the likeliest completions of 100 held-out questions are scored. All arms have the recipe's rate and
schedule, which were not tuned, equal questions in equal order, and adapters as in configs/language/smollm2; one seed;
weights in float32, computed under bf16 autocast (or --precision 32-true), eager attention. Finished runs are kept in
results/reinforcement.json and skipped.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters, average
from benchmarks.timing import peak_memory_mib
from language.evaluate.metrics import Estimate
from language.generate import generate, prompt_rows
from language.grpo.module import main as grpo

ARMS = ("lora", "afa", "dora", "nora_plus_plus", "loran")
STEPS, EVERY = 100, 5  # the curve has means over so many steps
CURVES = ("reward", "exact_number", "number_only", "completion_length")


class _Measured(EagerSteps):
    """The rewards of each step, and of greedy completions before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}
        self.before: dict[str, Estimate] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.before = greedy(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:  # type: ignore[override]
        super().on_train_batch_end(trainer, *rest)
        for name, values in self.curves.items():
            values.append(float(trainer.callback_metrics[f"train/{name}"]))


def greedy(trainer: Trainer, module: Any) -> dict[str, Estimate]:
    """Mean rewards of the likeliest completions of the validation questions."""
    parts = []
    with trainer.precision_plugin.forward_context():
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            texts = generate(module.model, module.tokenizer, prompt_rows(batch), module.hparams["max_new_tokens"])
            parts.append(module.rewards(texts, batch["answers"]))
    scores = torch.cat(parts)
    columns = dict(zip(module.rewards.names, scores.T, strict=True)) | {"reward": scores @ module.rewards.weights}
    return {name: average(values.tolist()) for name, values in columns.items()}


def run(arm: str, steps: int, precision: str) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    peak_memory_mib(reset=True)
    start, measured = time.perf_counter(), _Measured()
    cli = grpo(
        [
            *("fit", f"--config={RECIPES / 'grpo.yaml'}", *adapters(arm)),
            *("--data.batch_size=4", "--data.val_subset=100", f"--trainer.max_steps={steps}"),
            *(f"--trainer.precision={precision}", "--trainer.limit_val_batches=0"),
            *("--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"),
            *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        ],
        trainer_defaults={"callbacks": [measured, la.AdapterCallback(statistics=[], figures=False)]},
        save_config_callback=None,
    )
    seconds = time.perf_counter() - start
    after = greedy(cli.trainer, cli.model)
    means = {
        name: [round(statistics.fmean(values[i : i + EVERY]), 4) for i in range(0, len(values), EVERY)]
        for name, values in measured.curves.items()
    }
    return {
        **{"arm": arm, "steps": steps, "precision": precision},
        "trainable": cli.model.report.trainable,  # type: ignore[union-attr]
        "before": {name: asdict(value) for name, value in measured.before.items()},
        "after": {name: asdict(value) for name, value in after.items()},
        "curve": {"every": EVERY, **{name: " ".join(map(str, values)) for name, values in means.items()}},
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 2),
        "peak_memory_mib": round(peak_memory_mib()),
        "environment": environment(),
    }


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["lora", "afa"], choices=ARMS)
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = RESULTS / "reinforcement.json"
    for arm in arguments.arms:
        key = {"arm": arm, "steps": STEPS, "precision": arguments.precision}
        if not any(key.items() <= r.items() for r in load(path)):
            append(path, run(arm, STEPS, arguments.precision))
        record = next(r for r in load(path) if key.items() <= r.items())
        for when in ("before", "after"):
            shown = ", ".join(f"{n} {v['value']:.3f} ± {v['stderr']:.3f}" for n, v in record[when].items())
            print(f"{arm:<15} {when:<6} {shown}", flush=True)
        print(f"{arm:<15} {record['seconds_per_step']} seconds a step", flush=True)


if __name__ == "__main__":
    main()
