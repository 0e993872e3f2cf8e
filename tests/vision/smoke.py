"""Runs of the smoke recipes through the real command line, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vision.__main__ import VisionCLI, main

CONFIGS = Path(__file__).parents[2] / "configs" / "vision"
QUIET = ["--trainer.enable_progress_bar=false"]


class SmokeRun(NamedTuple):
    """A fitted recipe, and the test of what it saved."""

    fitted: VisionCLI
    tested: VisionCLI


def quick_main(arguments: list[str], **settings: Any) -> VisionCLI:
    """`main` without the parsers of the other subcommands, which would take much of the time of a tiny run."""
    used = {name: skip for name, skip in VisionCLI.subcommands().items() if name == arguments[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionCLI, "subcommands", staticmethod(lambda: used))
        return main(arguments, **settings)


def command(subcommand: str, config: str, root: Path, *overrides: str) -> VisionCLI:
    """`python -m vision SUBCOMMAND --config configs/vision/CONFIG.yaml`, writing under `root`."""
    save = f"--trainer.logger.init_args.save_dir={root}"
    return quick_main([subcommand, f"--config={CONFIGS / config}.yaml", save, *QUIET, *overrides])


def log_dir(cli: VisionCLI) -> Path:
    return Path(cli.trainer.logger.log_dir)


def checkpoint(cli: VisionCLI, which: str = "last") -> Path:
    """Of the last epoch, or of the best one by validation."""
    return log_dir(cli) / "checkpoints" / f"{which}.ckpt"


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path, prefix: str) -> dict[str, float]:
    """Last values of the scalars whose tags begin with `prefix`."""
    board: Any = events(folder)
    return {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"] if tag.startswith(prefix)}
