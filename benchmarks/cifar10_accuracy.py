"""Does NoRA learn? CIFAR-10 accuracy of each recipe in configs/vision/offline, with equal data, steps and tuning.

    python -m benchmarks.cifar10_accuracy --root FOLDER_WITH_TRAIN_AND_TEST [--arms head lora ...] [--threads 1]

Protocol: the learning rate of each arm is chosen among two on 1,000 held-out training images after one epoch of 3,000
images. Then `full`: 10,000 images, 3 epochs, all 10,000 test images. `few`: 50 images a class, 10 epochs, three seeds
of head, adapters and data order, 2,000 test images. AdamW, one-cycle schedule, batch 64, 56 px, fp32. Finished runs
are kept and skipped.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.timing import peak_memory_mib
from vision.__main__ import main as vision

RATES = {
    "head": (5e-3, 2e-2),
    "full": (1e-4, 3e-4),
    "lora": (1e-3, 3e-3),
    "nora": (5e-3, 1e-2),
    "nora_anchored": (5e-3, 1e-2),
    "nora_published": (1e-3, 5e-3),
    "nora_plus_plus": (1e-3, 3e-3),
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "rate": {"epochs": 1, "data": ["--data.train_subset=3000", "--data.val_subset=1000"]},
    "full": {"epochs": 3, "data": ["--data.train_subset=10000", "--data.val_subset=1000"]},
    "few": {"epochs": 10, "data": ["--data.few_shot=50", "--data.val_subset=1000", "--data.test_subset=2000"]},
}
ORDERS = (0, 1, 2)


class Steps(Callback):
    """Seconds between the ends of training steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def run(arm: str, protocol: str, rate: float, order: int, root: str) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    settings = PROTOCOLS[protocol]
    peak_memory_mib(reset=True)
    start, steps = time.perf_counter(), Steps()
    cli = vision(
        [
            *("fit", f"--config=configs/vision/offline/{arm}.yaml", f"--data.root={root}", "--data.source=folder"),
            *(f"--optimizer.lr={rate}", f"--lr_scheduler.max_lr={rate}", f"--data.order_seed={order}"),
            *(f"--trainer.max_epochs={settings['epochs']}", "--trainer.limit_val_batches=0", "--trainer.logger=false"),
            *(f"--seed_everything={order}", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *settings["data"]),
        ],
        trainer_defaults={"callbacks": [steps]},
        save_config_callback=None,
    )
    seconds = time.perf_counter() - start
    report = cli.model.report
    record = {
        "arm": arm,
        "protocol": protocol,
        "rate": rate,
        "order": order,
        "trainable": report.trainable,
        "trainable_without_head": report.trainable_without_head,
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(steps.median(), 4),
        "peak_memory_mib": round(peak_memory_mib()),
    }
    cli.trainer.limit_val_batches = 1.0
    split = "val" if protocol == "rate" else "test"
    evaluate = cli.trainer.validate if protocol == "rate" else cli.trainer.test
    metrics = evaluate(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    loader = cli.datamodule.val_dataloader() if protocol == "rate" else cli.datamodule.test_dataloader()
    return record | {
        "accuracy": metrics[f"{split}/acc1"],
        "loss": metrics[f"{split}/loss"],
        "n": len(loader.dataset),
        "split": split,
        "environment": environment(),
    }


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with train/ and test/, or train.tar.gz and test.tar.gz")
    parser.add_argument("--arms", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--protocols", nargs="+", default=["full", "few"], choices=["full", "few"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="cifar10_accuracy", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = RESULTS / f"{arguments.name}.json"

    def once(arm: str, protocol: str, rate: float, order: int) -> dict[str, Any]:
        key = {"arm": arm, "protocol": protocol, "rate": rate, "order": order}
        known = [r for r in load(path) if key.items() <= r.items()]
        if not known:
            append(path, run(arm, protocol, rate, order, arguments.root))
            known = [r for r in load(path) if key.items() <= r.items()]
        print(f"{arm:<16} {protocol:<5} lr {rate:g} order {order}: {known[0]['accuracy']:.4f}", flush=True)
        return known[0]

    best = {}
    for protocol in arguments.protocols:
        for arm in arguments.arms:
            tried = [once(arm, "rate", rate, 0) for rate in RATES[arm]]
            best[arm] = max(tried, key=lambda r: r["accuracy"])["rate"]
            for order in ORDERS if protocol == "few" else ORDERS[:1]:
                once(arm, protocol, best[arm], order)


if __name__ == "__main__":
    main()
