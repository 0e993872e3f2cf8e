"""Merges adapters into the model that they were trained on, and measures the error of that."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lit_adapters.activations import LEARNED_ACTIVATIONS
from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.matrix_layers import is_quantised
from lit_adapters.methods.method import to_methods
from lit_adapters.methods.quantised import foreign_quantisation
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.model.adapter_sets import sets_of
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.record import adapters, attachment, inner, released, remove_adapters
from lit_adapters.model.save_guard import guard_saving
from lit_adapters.model.sharding import refuse_sharded
from lit_adapters.model.together import Together

SHARED = "shared_with"  # attribute of a parameter that another model also has: the name of that model


@dataclass(frozen=True)
class MergeReport:
    """Result of `merge`.

    Attributes:
        max_abs_error: The largest |stored - exact| over all merged parameters, with the exact value in float64.
        max_rel_error: The same relative to the largest value of the parameter.
        merged: The names of the layers whose parameters now hold the update.
        kept: The names of the activations that keep their learned functions, now with plain coefficients.
        dequantised: The names of the merged layers whose weight was quantised and is a plain one now.
    """

    max_abs_error: float
    max_rel_error: float
    merged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dequantised: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"merged {len(self.merged)} layers, error {self.max_abs_error:.1e} ({self.max_rel_error:.1e} of |W|)"
        if self.dequantised:
            text += f"; {len(self.dequantised)} of them were quantised and take the memory of plain weights now"
        return text + (f"; {len(self.kept)} rational activations stay" if self.kept else "")


def parameter_holders(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that have a parameter, by its id."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(name)
    return holders


def check_untied(
    holders: dict[int, list[str]], parameter: nn.Parameter | None, key: str, layer: str, place: str | None = None
) -> None:
    """Check that no other module has a parameter that merging is to change.

    Args:
        holders: As `parameter_holders` returns it.
        parameter: The parameter; None where merging adds it.
        key: Its name in the layer.
        layer: Name of the adapted layer.
        place: Name of the module that has the parameter, where it is another than the layer.

    Raises:
        AdapterError: Another module has it.
    """
    twins = [] if parameter is None else [name for name in holders[id(parameter)] if name != (place or layer)]
    if twins:
        raise AdapterError(f"{layer!r} and {twins[0]!r} have one {key}, and merging would change both; untie them")


def _check(model: nn.Module, merging: dict[str, AdapterModule], unload: bool) -> None:
    """Check that the parameters of all adapted layers can hold the effect of their adapters.

    Raises:
        AdapterError: An adapter cannot be merged at present, or a parameter is tied to another layer or model.
    """
    holders = parameter_holders(model)
    for name, adapter in merging.items():
        adapter.check_mergeable()
        parts = adapter.parts.values() if isinstance(adapter, Together) else [adapter]
        tensors = [item for part in parts for item in part.adapter_tensors().items()]
        broken = [key for key, tensor in tensors if not tensor.isfinite().all()]
        if broken:
            raise AdapterError(
                f"{broken[0]} of {name!r} holds values that are not finite, which merging would put into the weights: "
                "load an earlier checkpoint, or lower the learning rate"
            )
        for key in adapter.merges_into:
            parameter = adapter._parameters.get(key)
            check_untied(holders, parameter, key, name)
            other = getattr(parameter, SHARED, None)
            if unload and other:
                raise AdapterError(
                    f"the {key} of {name!r} is also {other}'s, which merging would change; merge a copy.deepcopy of "
                    "the model, or with unload=False"
                )


def merge(model: nn.Module, unload: bool = True) -> MergeReport:
    """Add weight updates to the weights, in float32 and cast once, and fold NoRA's factors into plain coefficients.

    Args:
        model: The module given to `attach`.
        unload: True removes the adapters for good: linear layers are the base's own again, adapted activations become
            `RationalActivation` or `AffineActivation`, quantised weights become plain ones, and `requires_grad` is as
            before `attach`. False keeps the adapters and puts a merged weight beside every pretrained one, so that
            `unmerge` restores the model bit for bit.

    Returns:
        The errors of the merge and the names of the layers.

    Raises:
        AdapterError: The model has no adapters or is merged already, an adapter is nonlinear at present (AFA-LoRA
            before beta = 0) or holds values that are not finite, or a weight is on the meta device, sharded, tied to
            another layer, or, with unload=True, shared with another model (marked `shared_with`) or unknown to the
            model's configuration. The model is then as before.
    """
    model = inner(model)
    state = attachment(model, several=True)
    others = [n for n in sets_of(model).by_name if n not in state.names]
    if unload and others:
        raise AdapterError(
            f"merging changes the weights that the adapters {', '.join(map(repr, others))} were trained on: save them, "
            "call lit_adapters.detach(model, name) for each, and merge then; or use merge(model, unload=False)"
        )
    refuse_sharded(model, "merging")
    require_loaded(model, "merging")
    found = list(adapters(model))
    done = [name for name, adapter in found if adapter.merged]
    if done:
        raise AdapterError(f"{done[0]!r} is merged already; call lit_adapters.unmerge(model) first")
    merging = {name: adapter for name, adapter in found if adapter.merges_into}
    together = next((n for n, a in found if isinstance(a, Together) and n not in merging), None)
    if together is not None:
        raise AdapterError(
            f"no module without adapters computes what several do together at {together!r}; make one of them with "
            "lit_adapters.combine, and merge that"
        )
    _check(model, merging, unload)
    methods = [part for method in to_methods(state.methods) for part in method.parts()]
    if unload:
        for method in methods:
            method.check_merge(model, list(merging))
    dequantised = [
        n
        for n, a in merging.items()
        if "weight" in a.merges_into and (a.layer.is_packed if isinstance(a, WeightAdapter) else is_quantised(a.base))
    ]
    errors = [(0.0, 0.0), *(adapter.absorb() if unload else adapter.merge() for adapter in merging.values())]
    kept = [name for name, _ in found if name not in merging]
    if unload:
        remove_adapters(model, _successor)
        sets_of(model).forget(model)
        for name, parameter in model.named_parameters():
            weight = f"{name.rpartition('.')[0]}.weight"  # a parameter that merging has added does as this
            parameter.requires_grad_(state.required_grad.get(name, state.required_grad.get(weight, False)))
        for method in methods:
            method.finish_merge(model, list(merging))
        if kept:
            guard_saving(model, functions=True)
    if dequantised and unload and not any(is_quantised(m) or foreign_quantisation(m) for m in model.modules()):
        forget_quantisation(model)
    return MergeReport(max(e for e, _ in errors), max(e for _, e in errors), list(merging), kept, dequantised)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a merged model to a dtype, except for the coefficients of learned activations, which stay in float32."""
    functions = [module for module in model.modules() if isinstance(module, LEARNED_ACTIVATIONS)]
    tensors = [t for m in functions for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    kept = [tensor.detach().clone() for tensor in tensors]
    model.to(dtype)
    now = [t for m in functions for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    for tensor, values in zip(now, kept, strict=True):
        tensor.data = values


def forget_quantisation(model: nn.Module) -> None:
    """Remove transformers' note that a model is quantised; with it, the model could not be saved and loaded again."""
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None)
        if quantizer is not None and hasattr(quantizer, "remove_quantization_config"):
            quantizer.remove_quantization_config(module)


def _successor(adapter: AdapterModule) -> nn.Module:
    return released(adapter) if adapter.merges_into else adapter.folded()


def unmerge(model: nn.Module) -> None:
    """Undo `merge(model, unload=False)`: every weight is the pretrained one again, bit for bit.

    Raises:
        AdapterError: No merge is in effect.
    """
    merged = [adapter for _, adapter in adapters(model) if adapter.merged]
    if not merged:
        raise AdapterError("nothing is merged; merge(model, unload=False) is what unmerge undoes")
    for adapter in merged:
        adapter.unmerge()
