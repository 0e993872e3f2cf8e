"""Calibration at the start of a training: on its first batches, with the same result in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.modes import calibrate
from lit_adapters.model.record import adapters
from lit_adapters.training.processes import broadcast_object, process_count


def awaits_calibration(model: nn.Module) -> bool:
    """Whether a method asks for calibration and has not had it yet."""
    return any(adapter.awaits_calibration for _, adapter in adapters(model))


def calibrate_together(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any], loss: Callable[[Any], Tensor] | None = None
) -> None:
    """Calibrate the adapters of `model`; every process calls this.

    All processes take what the first one measured on its own share of the data, so that they hold the same functions.
    The others measure too, as the passes of a sharded model need every process.

    Args:
        model: Holds the adapters.
        batches: The first training batches.
        run: Passes one batch through `model`.
        loss: The loss of one batch, for adapters that need the gradient of their weight.

    Raises:
        AdapterError: `run` or `loss` does not accept a batch in the first process, or an adapter saw no input there.
    """
    failure = None
    try:
        calibrate(model, batches, run, loss)
    except AdapterError as error:
        failure = error
    if process_count() == 1:
        if failure is not None:
            raise failure
        return
    measured = {
        name: {key: tensor.detach().cpu() for key, tensor in adapter.calibrated_tensors().items()}
        for name, adapter in _calibrated(model)
    }
    message, measured = broadcast_object((None if failure is None else str(failure), measured))
    if message is not None:
        raise AdapterError(message) from failure
    for name, adapter in _calibrated(model):
        adapter.load_state_dict(measured[name], strict=False)


def _calibrated(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    return [(n, a) for n, a in adapters(model) if a.calibrates]
