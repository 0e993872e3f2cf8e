"""A Lightning callback that writes the report of a run; the command line takes it as any other callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from benchmarks.jobs.report import Report


class StepClock(Callback):
    """Notes when stages and steps end, and counts what is read.

    Args:
        report: The file to write.
    """

    def __init__(self, report: str) -> None:
        self.report = Report(report)
        self.report.stage("start-up")  # the command line makes its callbacks when all is imported and parsed

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The data have been read."""
        self.report.stage("data")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model has been built."""
        self.report.count_trained(pl_module)
        self.report.stage("model")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch, or the completions that were sampled for it."""
        self.report.step()
        if isinstance(outputs, dict):
            self.report.loss(outputs["loss"])
        read = getattr(pl_module, "rollout", None) or batch
        if isinstance(read, dict):
            from language.loss import IGNORED  # a job of images need not import transformers

            self.report.count_text(read["input_ids"], read["labels"] != IGNORED)
        else:
            self.report.count(images=len(read[0]))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the report."""
        self.report.write()
