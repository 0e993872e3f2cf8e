"""Statistics and figures of the adapters of a model as it is, in any program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from matplotlib.figure import Figure
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.training.attached import adapter_layers
from lit_adapters.training.observer import InputObserver
from lit_adapters.training.recording import Recorder, Statistic, checked_statistics
from lit_adapters.training.tensorboard import figures_of


def statistics(model: nn.Module, kinds: Sequence[Statistic] = get_args(Statistic)) -> dict[str, float]:
    """What `AdapterCallback` logs, of a model as it is: scalars by tag.

    Tags are `adapter/<method>/<layer>/<statistic>`, `adapter/summary/<statistic>` (means over layers), and
    `adapter/subspace/<statistic>`. `docs/reading-tensorboard.md` says what they mean. Statistics of the inputs of a
    training batch are not among them.

    Args:
        model: With adapters.
        kinds: "functions", "weights" and "subspace", as for `AdapterCallback`.

    Raises:
        AdapterError: The model has no adapters, or one of `kinds` is unknown.
    """
    _require_adapters(model)
    betas = [a.beta.item() for a in adapter_layers(model).values() if a.schedule is not None]  # type: ignore[operator]
    return Recorder(model, checked_statistics(kinds)).record(0, max(betas, default=None))


def figures(model: nn.Module) -> dict[str, Figure]:
    """The figures that `AdapterCallback` draws, of a model as it is, by tag.

    Learned functions beside the pretrained ones, their changes and slopes, maps of layers, spectra. The densities of
    inputs are those of the calibration.

    Args:
        model: With adapters.

    Raises:
        AdapterError: The model has no adapters.
    """
    _require_adapters(model)
    layers = adapter_layers(model)
    return figures_of(layers, InputObserver(layers), subspace=True)


def _require_adapters(model: nn.Module) -> None:
    if not adapter_layers(model):
        raise AdapterError(f"{type(model).__name__} has no adapters; call lit_adapters.attach(model, ...) first")
