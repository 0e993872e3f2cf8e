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

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

import lit_adapters as la
from benchmarks.arms import adapted
from benchmarks.results_file import RESULTS, environment
from benchmarks.runner import QUIET, Runner, add_precision, parser
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters, average
from benchmarks.timing import peak_memory_mib
from language.evaluate.metrics import Estimate
from language.generate import generate, prompt_rows
from language.grpo.__main__ import main as grpo

STEPS = 100
EVERY = 5  # the curve has means over so many steps
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
    start = time.perf_counter()
    measured = _Measured()
    cli = grpo(
        [
            "fit",
            f"--config={RECIPES / 'grpo.yaml'}",
            *adapters(arm),
            "--data.batch_size=4",
            "--data.val_subset=100",
            f"--trainer.max_steps={steps}",
            f"--trainer.precision={precision}",
            "--trainer.limit_val_batches=0",
            "--trainer.val_check_interval=1.0",
            "--trainer.check_val_every_n_epoch=1",
            *QUIET,
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
        "arm": arm,
        "steps": steps,
        "precision": precision,
        "trainable": cli.model.report.trainable,  # type: ignore[union-attr]
        "before": {name: asdict(value) for name, value in measured.before.items()},
        "after": {name: asdict(value) for name, value in after.items()},
        "curve": {"every": EVERY, **{name: " ".join(map(str, values)) for name, values in means.items()}},
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 2),
        "peak_memory_mib": round(peak_memory_mib()),
        "environment": environment(),
    }


def rewards(record: dict[str, Any]) -> str:
    """Mean rewards before and after, and the time of a step."""
    values = []
    for when in ("before", "after"):
        shown = ", ".join(f"{name} {v['value']:.3f} ± {v['stderr']:.3f}" for name, v in record[when].items())
        values.append(f"{when}: {shown}")
    return "; ".join([*values, f"{record['seconds_per_step']} seconds a step"])


def main() -> None:
    """Run what is missing in the result file."""
    options = parser(__doc__, adapted("regimes"), default=["lora", "afa"])
    add_precision(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    runner = Runner(RESULTS / "reinforcement.json", run, rewards)
    for arm in args.arms:
        runner.once(arm=arm, steps=STEPS, precision=args.precision)


if __name__ == "__main__":
    main()
