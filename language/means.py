"""Means of what a model is measured by, over all batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric


class Means(nn.Module):
    """Several means by name; every value counts the same, however the values fall into batches and processes.

    Args:
        names: What is measured.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        # "disable": a value that is not a number is not left out.
        self.metrics = nn.ModuleList(MeanMetric(nan_strategy="disable") for _ in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Means:
        """Move the sums, and keep their dtype: a sum in bfloat16 stops growing after some hundred values."""
        super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)
        return self

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add values, (n,) for each name; n may differ between names."""
        for name, metric in zip(self.names, self.metrics, strict=True):
            metric.update(values[name].detach())  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """The means by name, over all processes."""
        return {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}  # type: ignore[operator]

    def reset(self) -> None:
        """Begin anew."""
        # What is made in Lightning's inference mode could not be written to outside it, where `fit` validates.
        with torch.inference_mode(False):
            for metric in self.metrics:
                metric.reset()  # type: ignore[operator]
