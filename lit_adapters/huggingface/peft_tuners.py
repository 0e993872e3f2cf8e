"""Registers methods of this library with peft: importing this module is enough.

    from lit_adapters.huggingface.peft_tuners import NoRAConfig

    model = peft.get_peft_model(model, NoRAConfig(groups=8, rank=3, base="anchored"))

Then `PeftModel.from_pretrained`, `save_pretrained`, `set_adapter`, `disable_adapter`, `merge_and_unload` and the
`peft_config` of TRL's trainers work as for LoRA. A program that loads such a file imports this module first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.huggingface.peft_configs import (
    CONFIGS,
    AFALoRAConfig,
    GroupAffineConfig,
    LoRA2Config,
    LoRANConfig,
    MethodType,
    NestedLoRAConfig,
    NoRAConfig,
    NoRAPlusPlusConfig,
)
from lit_adapters.huggingface.peft_layer import PREFIX, AdaptedLayer
from lit_adapters.methods.matrix_layers import is_quantised, stop_repacking
from lit_adapters.methods.targets import Target, exactly, matches, places
from lit_adapters.model.attach import assign
from lit_adapters.model.merge import check_untied, forget_quantisation, parameter_holders
from lit_adapters.model.record import adapters, fit_in
from lit_adapters.model.save_guard import guard_saving

__all__ = [
    "AFALoRAConfig",
    "GroupAffineConfig",
    "LoRA2Config",
    "LoRANConfig",
    "NestedLoRAConfig",
    "NoRAConfig",
    "NoRAPlusPlusConfig",
]


class MethodModel(BaseTuner):  # type: ignore[misc]
    """Peft's model for all methods of this library; `peft.get_peft_model` makes it."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Build all adapters while the model looks as if it had none."""
        attached = [name for name, module in adapters(self.model) if not _is_ours(self.model, name)]
        if attached:
            raise AdapterError(
                f"{attached[0]!r} has an adapter of lit_adapters.attach, which peft would freeze; call "
                "lit_adapters.detach(model) first, or use attach for all"
            )
        with _pretrained(self.model):
            found = assign(self.model, peft_config.method().parts(), list(peft_config.modules_to_save or ()))
            built = {target.name: build() for target, build in found}
        for target, _ in found:
            fit_in(built[target.name], target)
        _separate_shared_functions([target for target, _ in found])
        self._adapters = built
        if peft_config.takes_targets() and peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = exactly(sorted(built), self.model)  # the file depends on no defaults then
        return peft_config

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse what peft would ignore: rows of one batch with adapters of their own.

        Raises:
            AdapterError: `adapter_names` is given to `forward` or `generate`.
        """
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("adapters of lit_adapters cannot differ within a batch; leave adapter_names out")
        yield

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._adapters:
            return True
        return _ExcludedModule() if matches(key, list(peft_config.exclude_modules or ())) else False

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._adapters:
            raise AdapterError(
                f"the file has an adapter for {current_key!r}, which {type(peft_config.method()).__name__} would not "
                "adapt here; load it with the model that it was trained on"
            )
        adapter = self._adapters.pop(current_key)
        adapter.stand_beside()
        layer = target if isinstance(target, AdaptedLayer) else AdaptedLayer(target)
        layer.lit_adapter[adapter_name] = adapter
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)  # as peft has it: a further adapter trains once it is active
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # adapters are where their layer is

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        for module in model.modules():
            if is_quantised(module):
                stop_repacking(module)

    def _check_new_adapter_config(self, config: Any) -> None:
        """Accept any further adapter of the same kind of tuner: a layer uses one at a time."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        configs: dict[str, Any] = self.peft_config
        methods = [part for name in self.active_adapters for part in configs[name].method().parts()]
        merging = [name for name, adapter in adapters(self.model) if adapter.merges_into]
        dequantised = [a for _, a in adapters(self.model) if is_quantised(a.base) and "weight" in a.merges_into]
        if merge:
            for method in methods:
                method.check_merge(self.model, merging)
            _check_untied(self.model)
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # type: ignore[func-returns-value]
        if merge:
            guard_saving(model, functions=True)
            for method in methods:
                method.finish_merge(model, merging)
            if dequantised and not any(hasattr(p, "quant_state") for p in model.parameters()):
                forget_quantisation(model)
        return model


def _separate_shared_functions(targets: Sequence[Target]) -> None:
    """Give each place its own module, where one function stands at several places: peft looks at a module once.

    Raises:
        AdapterError: A layer with parameters stands at several places.
    """
    first: dict[int, str] = {}
    for target in targets:
        other = first.setdefault(id(target.module), target.name)
        if other == target.name:
            continue
        if next(target.module.parameters(), None) is not None:
            raise AdapterError(
                f"{other!r} and {target.name!r} are one and the same layer, which peft would adapt once; exclude both, "
                "or use lit_adapters.attach"
            )
        if not isinstance(getattr(target.parent, target.attribute), AdaptedLayer):
            setattr(target.parent, target.attribute, copy.copy(target.module))


def _check_untied(model: nn.Module) -> None:
    """Check that no other layer has a parameter that merging would change.

    Raises:
        AdapterError: One has, such as an embedding that is tied to an adapted head.
    """
    holders = parameter_holders(model)
    for name, layer in model.named_modules():
        adapter = layer.acting() if isinstance(layer, AdaptedLayer) else None
        for key in () if adapter is None else adapter.merges_into:
            parameter = layer.base_layer._parameters.get(key)  # type: ignore[union-attr]
            check_untied(holders, parameter, key, name, f"{name}.base_layer")


def _is_ours(model: nn.Module, name: str) -> bool:
    """Whether an adapter stands in one of peft's layers."""
    parent = name.rpartition(".")[0].rpartition(".")[0]
    return isinstance(model.get_submodule(parent), AdaptedLayer)


@contextmanager
def _pretrained(model: nn.Module) -> Iterator[None]:
    """Inside the block, every place holds its pretrained module."""
    layers = [place for place in places(model) if isinstance(place.module, AdaptedLayer)]
    for place in layers:
        setattr(place.parent, place.attribute, place.module.base_layer)
    try:
        yield
    finally:
        for place in layers:
            setattr(place.parent, place.attribute, place.module)


def _register() -> None:
    for config in CONFIGS:
        kind: Any = MethodType(config.peft_type_name)
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = MethodModel
        PEFT_TYPE_TO_PREFIX_MAPPING[kind] = PREFIX


_register()
