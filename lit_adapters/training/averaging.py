"""Averaged copies of a model that trains: what no training changes is the model's own in them, not a mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_adapters.methods.allocation import Allocated
from lit_adapters.model.record import adapters
from lit_adapters.training.attached import attached_models


@torch.no_grad()
def restore_constants(module: nn.Module, others: Iterable[nn.Module]) -> None:
    """Give copies of the adapted models in `module` its frozen parameters and its adapters' buffers.

    Means of equal values differ from them by rounding, and a mean of beta never reaches 0. Directions that a rank
    allocation has given up are 0 in the copies too.

    Args:
        module: The one that trains.
        others: Modules that may hold copies of its adapted models, such as averages of weights.
    """
    originals = attached_models(module)
    for other in others:
        for name, copied in attached_models(other).items():
            original = next((m for n, m in originals.items() if _are_copies(n, m, name, copied)), None)
            if original is not None:
                _restore(original, copied)


def _are_copies(name: str, model: nn.Module, other_name: str, other: nn.Module) -> bool:
    """Whether two adapted models have the same place and the same parameters, and are not one and the same."""
    short, long = sorted((name, other_name), key=len)
    same_place = short in ("", long) or long.endswith(f".{short}")
    return same_place and model is not other and _shapes(model) == _shapes(other)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _restore(original: nn.Module, copied: nn.Module) -> None:
    held = dict(copied.named_parameters())
    pairs: list[tuple[Tensor, Tensor]] = [(p, held[n]) for n, p in original.named_parameters() if not p.requires_grad]
    own = dict(adapters(copied))
    for name, adapter in adapters(original):
        buffers = own[name].adapter_buffers()
        pairs += [(buffer, buffers[key]) for key, buffer in adapter.adapter_buffers().items()]
    for value, place in pairs:
        if place is not value and not torch.equal(place, value.to(place)):
            place.copy_(value)
    for name, adapter in adapters(original):
        copied_adapter = own[name]
        if isinstance(adapter, Allocated) and isinstance(copied_adapter, Allocated) and adapter.kept is not None:
            copied_adapter.drop_directions(adapter.kept)
    for adapter in own.values():
        adapter.clear_caches()
