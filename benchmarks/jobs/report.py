"""What a process of a whole job tells of itself: when its stages and steps ended, and what it read.

Both sides of a comparison use it, so it imports nothing that takes time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that the steady time leaves out


class Report:
    """A file that a process writes before it ends.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stages: dict[str, float] = {}
        self.steps: list[float] = []
        self.counts: dict[str, int] = {}
        self.answers: list[str] = []  # what the model said, in the order of what it was asked
        self.first_loss: float | None = None

    def stage(self, name: str) -> None:
        """A stage ends now."""
        self.stages[name] = time.time()

    def step(self) -> None:
        """A step ends now."""
        self.steps.append(time.time())

    def loss(self, value: Any) -> None:
        """The loss of a batch; the first one is kept."""
        if self.first_loss is None:
            self.first_loss = float(value)

    def count(self, **numbers: int) -> None:
        """Add to the counts."""
        for name, number in numbers.items():
            self.counts[name] = self.counts.get(name, 0) + int(number)

    def count_text(self, ids: Any, learned: Any) -> None:
        """Count a batch of text.

        `read` is what the model reads, padding included, `learned` the tokens with a loss. `tokens` leaves out the
        padding: all that stands after the last learned token of a row.

        Args:
            ids: Token ids, (rows, length).
            learned: Whether a token has a loss, bool, the same shape.
        """
        lengths = ((learned.int().cumsum(1) < learned.sum(1, keepdim=True)).sum(1) + 1).clamp(max=ids.shape[1])
        self.count(read=ids.numel(), tokens=lengths.sum(), learned=learned.sum())

    def count_trained(self, module: Any) -> None:
        """Note how many parameters train."""
        self.counts["trained"] = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def write(self) -> None:
        """Write the file, when all has been saved."""
        self.stage("saving")
        found = {"stages": self.stages, "steps": self.steps, "counts": self.counts, "answers": self.answers}
        self.path.write_text(json.dumps(found | {"first_loss": self.first_loss}))


def steady_seconds(steps: list[float]) -> float:
    """Mean seconds of a step, with what happens between steps; the first ones are left out.

    Args:
        steps: When each step ended.

    Raises:
        SystemExit: There are no other steps.
    """
    counted = len(steps) - WARM_UP
    if counted < 1:
        raise SystemExit(f"error: {len(steps)} steps have no steady time: at least {WARM_UP + 1} are needed")
    return (steps[-1] - steps[WARM_UP - 1]) / counted


def stage_seconds(report: dict[str, Any], started: float, seconds: float) -> dict[str, float]:
    """How long each stage of a process took, in order, from its beginning to its exit.

    Args:
        report: What the process wrote.
        started: When it began, in seconds since the epoch.
        seconds: How long it took.
    """
    steps = report["steps"]
    of_steps = {"first step": steps[0], "other steps": steps[-1]} if steps else {}
    marks = report["stages"] | of_steps | {"exit": started + seconds}
    ends = sorted(marks.items(), key=lambda item: item[1])
    before = started
    found = {}
    for name, end in ends:
        found[name] = end - before
        before = end
    return found
