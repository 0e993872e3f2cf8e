"""Where figures and histograms go: TensorBoard, Weights & Biases and MLflow, each by one interface."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor


class Board(Protocol):
    """Shows figures and histograms of a run by their tags."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a figure."""

    def values(self, tag: str, values: Tensor, step: int) -> None:
        """Show how values, a float32 tensor on the CPU, are distributed."""

    def counts(self, tag: str, counts: Tensor, limits: Tensor, step: int) -> None:
        """Show counts (D,) of values between limits (D + 1,); both float64 on the CPU."""


class TensorBoard:
    """A `SummaryWriter` of TensorBoard.

    Args:
        writer: The writer.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(tag, figure, step)

    def values(self, tag: str, values: Tensor, step: int) -> None:
        self._writer.add_histogram(tag, values, step)

    def counts(self, tag: str, counts: Tensor, limits: Tensor, step: int) -> None:
        middle = (limits[1:] + limits[:-1]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=limits[0].item(),
            max=limits[-1].item(),
            num=int(counts.sum()),
            sum=float(counts @ middle),
            sum_squares=float(counts @ middle**2),
            bucket_limits=limits[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


class WeightsAndBiases:
    """A run of Weights & Biases. All that is shown at a step shares the axis `trainer/global_step`.

    Args:
        run: The run.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def _log(self, tag: str, value: Any, step: int) -> None:
        self._run.log({tag: value, "trainer/global_step": step})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        import wandb

        self._log(tag, wandb.Image(figure), step)

    def values(self, tag: str, values: Tensor, step: int) -> None:
        import wandb

        self._log(tag, wandb.Histogram(values.flatten().tolist()), step)

    def counts(self, tag: str, counts: Tensor, limits: Tensor, step: int) -> None:
        import wandb

        self._log(tag, wandb.Histogram(np_histogram=(counts.numpy(), limits.numpy())), step)


class MLflow:
    """A run of MLflow: figures are artifacts `TAG/step-N.png`. It has no histograms: `TAG/step-N.json` has the counts.

    Args:
        client: An `mlflow.MlflowClient`.
        run_id: The run.
    """

    _PARTS = 64

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self._client.log_figure(self._run_id, figure, f"{tag}/step-{step}.png")

    def values(self, tag: str, values: Tensor, step: int) -> None:
        counts, limits = torch.histogram(values.flatten(), self._PARTS)
        self.counts(tag, counts, limits, step)

    def counts(self, tag: str, counts: Tensor, limits: Tensor, step: int) -> None:
        table = {"limits": limits.tolist(), "counts": counts.tolist()}
        self._client.log_dict(self._run_id, table, f"{tag}/step-{step}.json")
