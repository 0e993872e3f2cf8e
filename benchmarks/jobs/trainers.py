"""Trainers of transformers and TRL that report their steps and what they read."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.jobs.report import Report


class StepEnds(TrainerCallback):
    """Reports the end of each step."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.report.step()


def reporting(trainer: type, report: Report) -> Any:
    """A trainer class that also counts what its batches hold, and reports its steps."""

    class Reporting(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(StepEnds(report))
            report.count_trained(self.model)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            _count(report, inputs)
            found = super().compute_loss(model, inputs, *args, **kwargs)
            report.loss(found[0] if isinstance(found, tuple) else found)
            return found

    return Reporting


def _count(report: Report, inputs: dict[str, Any]) -> None:
    if "pixel_values" in inputs:
        report.count(images=len(inputs["pixel_values"]))
    elif "completion_ids" in inputs:  # of GRPO: prompts padded on the left, completions on the right
        masks = inputs["prompt_mask"], inputs["completion_mask"]
        report.count(
            read=sum(mask.numel() for mask in masks),
            tokens=sum(mask.sum() for mask in masks),
            learned=masks[1].sum(),
        )
    elif "completion_mask" in inputs:
        report.count_text(inputs["input_ids"], inputs["completion_mask"].bool())
    else:
        report.count_text(inputs["input_ids"], inputs["labels"] != -100)


def plain_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments that all trainers get.

    float32 and no gradient checkpointing, where TRL's defaults are bfloat16 and checkpointing; a constant rate; no
    clipping of gradients; the rows in the order in which they stand. The adapter alone is saved, after the training.
    """
    return {
        "output_dir": job["out"],
        "num_train_epochs": job.get("epochs", 1),
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["lr"],
        "weight_decay": job["weight_decay"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
