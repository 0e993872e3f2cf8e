"""Gradients of pretrained weights, summed over passes of the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.weight_adapter import WeightAdapter


@contextmanager
def measuring_gradients(model: nn.Module, found: list[tuple[str, WeightAdapter]]) -> Iterator[None]:
    """Inside the block, backward passes give gradients to the weights of the adapters in `found` alone.

    Of a tied weight they are the gradients of its use in the adapter's own layer.

    At the end of the block, each adapter is given the sum, by `measure_gradient`. The sums are float32 on the CPU. On
    the device there is one gradient at a time, as each one is moved when it is ready.

    Args:
        model: With adapters.
        found: The adapters by name.

    Raises:
        AdapterError: The weight of an adapter got no gradient.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    sums: dict[str, Tensor] = {}

    def take(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.to("cpu", torch.float32)
        sums[name] = sums[name] + gradient if name in sums else gradient
        weight.grad = None

    for parameter, _ in required:
        parameter.requires_grad_(False)
    given = []
    for name, adapter in found:
        weight = adapter.base._parameters["weight"]
        assert weight is not None
        own = nn.Parameter(weight.detach())  # the same memory, but used by this layer alone
        own.register_post_accumulate_grad_hook(partial(take, name))
        for table in (adapter.base._parameters, adapter._parameters):
            if table.get("weight") is weight:
                given.append((table, weight))
                table["weight"] = own
    try:
        with torch.enable_grad():
            yield
    finally:
        for table, weight in given:
            table["weight"] = weight
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
    for name, adapter in found:
        if name not in sums:
            raise AdapterError(
                f"no gradient reached the weight of {name!r}; the loss must be computed from what the model returns, "
                "and at least one batch must pass through every adapter"
            )
        adapter.measure_gradient(adapter.layer.matrix(adapter.base, sums[name]))
