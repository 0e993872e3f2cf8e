"""Where values stopped being finite, for the message of a run that has to stop."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_adapters.model.sharding import whole


def locate_nonfinite(pl_module: LightningModule, batch: Any) -> str:
    """Say what is broken first: a parameter, the batch, or the layer in which finite inputs turned into NaN or inf."""
    for name, parameter in pl_module.named_parameters():
        if not _finite(parameter):
            return f"the parameter {name!r} is no longer finite"
    layer = _first_layer(pl_module, batch)  # whatever the batch holds: the other processes of a sharded model wait
    if not _finite(batch):
        return "the batch itself holds values that are not finite"
    return f"it came up in layer {layer!r}" if layer else "every layer's output is finite, so it came up in the loss"


def _first_layer(pl_module: LightningModule, batch: Any) -> str | None:
    """Repeat the forward pass and watch every module; those without submodules report before those that hold them."""
    found: list[str] = []

    def watch(name: str) -> Any:
        return lambda module, args, output: None if found or _finite(output) else found.append(name)

    handles = [m.register_forward_hook(watch(n)) for n, m in pl_module.named_modules() if n]
    try:
        with torch.no_grad(), pl_module.trainer.precision_plugin.forward_context():
            pl_module.predict_step(batch, 0)
    except Exception:  # the diagnosis must not hide the error
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def nonfinite_gradient(module: nn.Module, precision: Precision) -> str | None:
    """The name of a trainable parameter whose gradient holds NaN or inf; None while a gradient scaler handles these."""
    if getattr(precision, "scaler", None) is not None:
        return None
    named = [(n, p.grad) for n, p in module.named_parameters() if p.requires_grad and p.grad is not None]
    if not named or torch.isfinite(whole(torch.nn.utils.get_total_norm([g for _, g in named]))):
        return None
    return next((name for name, gradient in named if not _finite(gradient)), None)


def _finite(values: Any) -> bool:
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point())
    return all(bool(torch.isfinite(whole(t.detach())).all()) for t in tensors)


def broken_values(module: nn.Module) -> list[str]:
    """Names of trainable parameters that hold NaN or inf, and of buffers that hold NaN; inf may be a mask's own."""
    parameters = [n for n, p in module.named_parameters() if p.requires_grad and not _finite(p)]
    return parameters + [n for n, b in module.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]
