"""What the benchmarks that train SmolLM2-135M share."""

from __future__ import annotations

from pathlib import Path


def alpaca_rows(root: Path) -> list[str]:
    """Options that give a recipe of configs/language/smollm2 the rows of ROOT/alpaca_demo."""
    return [
        f"--data.path={root}/alpaca_demo/train.jsonl",
        "--data.format=alpaca",
        "--data.max_length=192",
        "--data.batch_size=4",
        "--data.val_fraction=0.1",
        "--data.val_subset=50",
        "--data.test_fraction=0.1",
        "--data.test_subset=100",
    ]
