"""Fold adapters into the model they were trained on, with the error of doing so measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lit_adapters.attach import adapters, attachment, remove_adapters
from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule, WeightAdapter


@dataclass(frozen=True)
class MergeReport:
    """Result of `merge`.

    Attributes:
        max_abs_error: largest |stored - exact| over all merged weights, the exact sum taken in float64.
        max_rel_error: the same relative to the largest weight of its layer.
        merged: names of the layers whose weight now holds the update.
        kept: names of the layers that stay nonlinear: NoRA's functions, with factors folded into plain coefficients.
    """

    max_abs_error: float
    max_rel_error: float
    merged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"merged {len(self.merged)} layers, error {self.max_abs_error:.1e} ({self.max_rel_error:.1e} of |W|)"
        return text + (f"; {len(self.kept)} rational activations stay" if self.kept else "")


def _merge_measured(adapter: WeightAdapter) -> tuple[float, float]:
    exact = adapter.weight.detach().double() + adapter.delta_weight(torch.float64).detach()
    adapter.merge()
    error = (adapter.weight.detach().double() - exact).abs().max().item()
    return error, error / max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)


def _check(model: nn.Module, weights: dict[str, WeightAdapter]) -> None:
    """Raise where the weight of an adapted layer cannot take an update."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(name)
    for name, adapter in weights.items():
        weight = adapter.weight
        if not weight.is_floating_point() or weight.is_meta:
            raise AdapterError(
                f"{name!r} has a weight of {weight.dtype} on {weight.device}: load or dequantise it first"
            )
        twins = [n for n in holders[id(weight)] if n != name]
        if twins:
            raise AdapterError(f"{name!r} and {twins[0]!r} have one weight, and merging would change both; untie them")


def merge(model: nn.Module, unload: bool = True) -> MergeReport:
    """Add weight updates to the weights, in float32 and cast once, and fold NoRA's factors into plain coefficients.

    Args:
        model: the module given to `attach`.
        unload: final, no wrapper left: linear layers are the base's own again, adapted activations become
            `RationalActivation`. False keeps the wrappers and a copy of every merged weight, so that `unmerge`
            restores it bit for bit.

    Raises:
        AdapterError: the model has no adapters or is merged already, or a weight cannot take an update because it is
            quantised or tied to another layer. The model is then as before.
    """
    attachment(model)
    found = list(adapters(model))
    done = [name for name, adapter in found if adapter.merged]
    if done:
        raise AdapterError(f"{done[0]!r} is merged already; call lit_adapters.unmerge(model) first")
    weights = {name: adapter for name, adapter in found if isinstance(adapter, WeightAdapter)}
    _check(model, weights)
    errors = [(0.0, 0.0), *(_merge_measured(adapter) for adapter in weights.values())]
    kept = [name for name, _ in found if name not in weights]
    if unload:
        remove_adapters(model, _successor)
    return MergeReport(max(e for e, _ in errors), max(e for _, e in errors), list(weights), kept)


def _successor(adapter: AdapterModule) -> nn.Module:
    return adapter.unwrapped() if isinstance(adapter, WeightAdapter) else adapter.folded()


def unmerge(model: nn.Module) -> None:
    """Undo `merge(model, unload=False)`: every weight is the pretrained one again, bit for bit.

    Raises:
        AdapterError: no merge is in effect.
    """
    merged = [a for _, a in adapters(model) if isinstance(a, WeightAdapter) and a.merged]
    if not merged:
        raise AdapterError("nothing is merged; merge(model, unload=False) is what unmerge undoes")
    for adapter in merged:
        adapter.unmerge()
