"""The attached models inside the module that trains, and the names of their layers in logs."""

from __future__ import annotations

from torch import nn

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.record import adapters, attached


def attached_models(module: nn.Module) -> dict[str, nn.Module]:
    """Every model of the tree that was given to `attach`, by qualified name ("" for `module` itself)."""
    return dict(attached(module))


def adapter_layers(module: nn.Module) -> dict[str, AdapterModule]:
    """All adapters by layer name: the one `attach` reported, or the name in the whole tree if it holds several models.

    The attribute under which the training module keeps its model says nothing about the layer.
    """
    models = attached_models(module)
    return dict(adapters(next(iter(models.values())) if len(models) == 1 else module))
