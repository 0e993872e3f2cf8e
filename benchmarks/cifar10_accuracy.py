"""Does NoRA learn? CIFAR-10 accuracy of each recipe in configs/vision/offline, with equal data, steps and tuning.

    python -m benchmarks.cifar10_accuracy --root FOLDER_WITH_TRAIN_AND_TEST [--arms head lora ...] [--threads 1]

Protocol: the learning rate of each arm is chosen among two on 1,000 held-out training images after one epoch of 3,000
images. Then `full`: 10,000 images, 3 epochs, all 10,000 test images. `few`: 50 images a class, 10 epochs, three seeds
of head, adapters and data order, 2,000 test images. AdamW, one-cycle schedule, batch 64, 56 px, fp32. Finished runs
are kept and skipped.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.arms import ARMS, names
from benchmarks.results_file import RESULTS, environment
from benchmarks.runner import QUIET, Runner, Steps, parser, rate_options
from benchmarks.timing import peak_memory_mib
from vision.__main__ import main as vision

PROTOCOLS: dict[str, dict[str, Any]] = {
    "rate": {"epochs": 1, "data": ["--data.train_subset=3000", "--data.val_subset=1000"]},
    "full": {"epochs": 3, "data": ["--data.train_subset=10000", "--data.val_subset=1000"]},
    "few": {"epochs": 10, "data": ["--data.few_shot=50", "--data.val_subset=1000", "--data.test_subset=2000"]},
}
ORDERS = (0, 1, 2)


def run(arm: str, protocol: str, rate: float, order: int, root: str) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    settings = PROTOCOLS[protocol]
    peak_memory_mib(reset=True)
    start, steps = time.perf_counter(), Steps()
    cli = vision(
        [
            "fit",
            f"--config=configs/vision/offline/{arm}.yaml",
            f"--data.root={root}",
            "--data.source=folder",
            f"--data.order_seed={order}",
            *settings["data"],
            *rate_options(rate),
            f"--seed_everything={order}",
            f"--trainer.max_epochs={settings['epochs']}",
            "--trainer.limit_val_batches=0",
            *QUIET,
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
    options = parser(__doc__, names("accuracy"))
    options.add_argument("--root", required=True, help="folder with train/ and test/, or train.tar.gz and test.tar.gz")
    options.add_argument("--protocols", nargs="+", default=["full", "few"], choices=["full", "few"])
    options.add_argument("--name", default="cifar10_accuracy", help="name of the result file")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    runner = Runner(
        RESULTS / f"{args.name}.json", partial(run, root=args.root), lambda record: f"{record['accuracy']:.4f}"
    )
    for protocol in args.protocols:
        for arm in args.arms:
            rate = runner.best_rate(ARMS[arm].rates, lambda record: -record["accuracy"], arm=arm, order=0)
            for order in ORDERS if protocol == "few" else ORDERS[:1]:
                runner.once(arm=arm, protocol=protocol, rate=rate, order=order)


if __name__ == "__main__":
    main()
