"""Where values stopped being finite, for the message of a run that has to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_adapters.model.sharding import whole


def locate_nonfinite(model: nn.Module, batch: Any, run: Callable[[Any], Any]) -> str:
    """Say what is broken first: a parameter, the batch, or the layer in which finite inputs turned into NaN or inf.

    Args:
        model: The module that trains.
        batch: The training batch whose loss is not finite.
        run: Passes a batch through `model` as the training step does; it is called once, without gradients.

    Returns:
        The end of a sentence: "it came up in layer 'blocks.1.fc2'".
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the parameter {name!r} is no longer finite"
    # Before the batch is looked at: in a sharded model the other processes wait for this forward pass.
    layer = _first_nonfinite_layer(model, batch, run)
    if not _is_finite(batch):
        return "the batch itself holds values that are not finite"
    return f"it came up in layer {layer!r}" if layer else "every layer's output is finite, so it came up in the loss"


def _first_nonfinite_layer(model: nn.Module, batch: Any, run: Callable[[Any], Any]) -> str | None:
    """Repeat the forward pass and watch every module; those without submodules report before those that hold them."""
    found: list[str] = []

    def watch(name: str) -> Any:
        return lambda module, args, output: None if found or _is_finite(output) else found.append(name)

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run(batch)
    except Exception:  # an error in the search must not hide the one that is explained
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def nonfinite_gradient(model: nn.Module) -> str | None:
    """The name of a trainable parameter whose gradient holds NaN or inf; None if there is no such parameter."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    if not gradients or torch.isfinite(whole(torch.nn.utils.get_total_norm(list(gradients.values())))):
        return None
    return next((name for name, gradient in gradients.items() if not _is_finite(gradient)), None)


def nonfinite_values(model: nn.Module) -> list[str]:
    """Names of trainable parameters that hold NaN or inf, and of buffers that hold NaN; a mask may hold inf."""
    parameters = [n for n, p in model.named_parameters() if p.requires_grad and not _is_finite(p)]
    return parameters + [n for n, b in model.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]


def _is_finite(values: Any) -> bool:
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point())
    return all(bool(torch.isfinite(whole(t.detach())).all()) for t in tensors)
