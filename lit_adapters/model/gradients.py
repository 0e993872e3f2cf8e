"""Gradients of pretrained weights, summed over passes of the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.weight_adapter import WeightAdapter


@contextmanager
def measuring_gradients(model: nn.Module, found: list[tuple[str, WeightAdapter]]) -> Iterator[None]:
    """Inside the block, backward passes give gradients to the weights of the adapters in `found` alone.

    At the end of the block, each adapter is given the sum, by `measure_gradient`. The sums are float32 on the CPU. On
    the device there is one gradient at a time, as each one is moved when it is ready.

    Args:
        model: With adapters.
        found: The adapters by name.

    Raises:
        AdapterError: The weight of an adapter got no gradient.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights: dict[str, nn.Parameter] = {name: adapter.base._parameters["weight"] for name, adapter in found}
    given = [(weight, weight.grad) for weight in weights.values()]
    sums: dict[nn.Parameter, Tensor] = {}

    def take(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        gradient = weight.grad.to("cpu", torch.float32)
        sums[weight] = sums[weight] + gradient if weight in sums else gradient
        weight.grad = None

    for parameter, _ in required:
        parameter.requires_grad_(False)
    handles = []
    for weight in set(weights.values()):
        weight.grad = None
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(take))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        for weight, gradient in given:
            weight.grad = gradient
    for name, adapter in found:
        if weights[name] not in sums:
            raise AdapterError(
                f"no gradient reached the weight of {name!r}; the loss must be computed from what the model returns, "
                "and at least one batch must pass through every adapter"
            )
        adapter.measure_gradient(adapter.layer.matrix(adapter.base, sums[weights[name]]))
