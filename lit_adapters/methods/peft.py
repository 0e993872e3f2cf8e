"""Methods of the peft library (https://github.com/huggingface/peft) that change single layers, in the form of ours.

peft injects its layers into the model; each becomes an adapter around its base layer like our own, and the model gets
its own modules back. Methods that cannot run without peft's model wrapper (prompts, task ids) are refused. What that
wrapper does after every optimiser step for AdaLoRA, the training does here: see `peft_allocation.py`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, ClassVar

from torch import nn

from lit_adapters.errors import AdapterError, TargetsNotFound, shown
from lit_adapters.methods.matrix_layers import is_quantised, stop_repacking
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.patterns import check_few_ways
from lit_adapters.methods.peft_adapter import PeftAdapter
from lit_adapters.methods.peft_allocation import AdaLoRAAllocation, AsaAllocation
from lit_adapters.methods.targets import Target, matched_names, near_misses, places

_ADAPTER = "default"  # peft's name for the first adapter of a layer
# Initialisations of peft's LoRA that do not change the pretrained weight.
SAFE_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_REFUSED_TYPES = {
    "POLY": "its layers ask for task ids beside every input, which only peft's own model passes on",
    "XLORA": "it routes between saved adapters inside peft's own model",
    "SHADOW": "it trains a second network beside the model",
    "ADAPTION_PROMPT": "it changes how attention runs",
}
_REFUSED_SETTINGS = {
    "modules_to_save": "name these modules in attach(..., train=...)",
    "trainable_token_indices": "use a method of peft type TRAINABLE_TOKENS beside this one",
    "target_parameters": "name modules in target_modules",
    "layer_replication": "it changes the model itself; build the deeper model first",
    "alora_invocation_tokens": "only peft's own model can find the tokens",
    "arrow_config": "it routes between saved adapters inside peft's own model",
    "kasa_config": "it changes the pretrained weights",
    "megatron_config": "it imports modules by the names in megatron_core; build Megatron's layers and use peft itself",
    "monteclora_config": "its loss term needs peft's own trainer",
}
_TOTAL_STEPS = 2**31  # of an AdaLoRA whose training tells them later


def require_peft() -> Any:
    """The peft library.

    Raises:
        AdapterError: Peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise AdapterError(f"this needs peft ({error}); pip install lit-adapters[peft]") from error
    return peft


@dataclass
class Peft(Method):
    """Configuration of any peft method that adapts layers one by one: LoRA variants, LoHa, IA3, OFT, VeRA and more.

    peft's own configuration sets the layers, ranks and dropout (`target_modules`, `exclude_modules`, ...).

    Args:
        config: A `peft.PeftConfig`, its dictionary with `peft_type`, or its form in a recipe (`class_path` and
            `init_args`); kept as a dictionary of plain values. A dictionary for AdaLoRA may leave `total_step` out: the
            training tells it.

    Raises:
        AdapterError: Peft is not installed or refuses the values, the method learns prompts, or a setting needs peft's
            own model.
    """

    name: ClassVar[str] = "peft"
    merges: ClassVar[str] = "where peft can"
    kind: ClassVar[str] = "linear"

    config: Any

    def __post_init__(self) -> None:
        config = self._build()
        kind = config.peft_type.value
        if kind.startswith("LIT_"):  # of lit_adapters.huggingface.peft_tuners
            raise AdapterError(
                f"{kind} is a method of this library: give attach lit_adapters.{config.method_class.__name__}, or the "
                "configuration to peft's get_peft_model"
            )
        if config.is_prompt_learning or config.is_adaption_prompt or kind in _REFUSED_TYPES:
            reason = _REFUSED_TYPES.get(kind, "it learns prompts, and no layer of the model")
            raise AdapterError(f"Peft cannot run {kind}: {reason}; use peft's get_peft_model")
        for setting, fix in _REFUSED_SETTINGS.items():
            if getattr(config, setting, None):
                raise AdapterError(f"{setting}={getattr(config, setting)!r} of {kind} is not supported: {fix}")
        bias = getattr(config, "bias", "none")
        if bias not in ("none", False, True):  # a boolean for some types, "none" or "all" for most
            raise AdapterError(f"bias={bias!r} of {kind} is not supported: name biases in attach(..., train=...)")
        init = getattr(config, "init_lora_weights", True)
        if kind == "LORA" and init == "eva":
            raise AdapterError("init_lora_weights='eva' needs peft's own model: use lit_adapters.LoRA(start='eva')")
        if kind == "LORA" and init not in SAFE_INITS:
            safe = ", ".join(str(name) for name in SAFE_INITS if name != "eva")
            raise AdapterError(
                f"init_lora_weights={init!r} changes the pretrained weights; use one of {safe}, or "
                "lit_adapters.LoRA(start=...), which does not change them"
            )
        plain = _plain(config)
        given = _without_class_path(self.config)
        if kind == "ADALORA" and isinstance(given, Mapping) and given.get("total_step") is None:
            plain["total_step"] = None
        self.config = plain

    def _build(self) -> Any:
        """The configuration as an object of peft, which checks the values."""
        peft = require_peft()
        if isinstance(self.config, peft.PeftConfig):
            return self.config
        given = _without_class_path(self.config)
        if not isinstance(given, Mapping) or "peft_type" not in given:
            raise AdapterError(
                f"config must be a peft.PeftConfig or its dictionary with peft_type, not {shown(self.config)}"
            )
        kind = given["peft_type"]
        if not isinstance(kind, str) or kind not in peft.PeftType.__members__:
            known = ", ".join(peft.PeftType.__members__)
            raise AdapterError(f"peft {peft.__version__} has no peft_type {shown(kind)}, only {known}")
        for setting, value in given.items():
            for pattern in _patterns(str(setting), value):
                check_few_ways(str(setting), pattern)
        values = copy.deepcopy(dict(given))
        if kind == "ADALORA" and values.get("total_step") is None:
            values["total_step"] = _TOTAL_STEPS
        try:
            return peft.PeftConfig.from_peft_type(**values)
        except Exception as error:  # configurations of peft raise many kinds
            raise AdapterError(f"peft refuses this {kind} configuration: {str(error)[:300]}") from error

    def forget_unmatched(self, model: nn.Module) -> None:
        """As for any method; peft's own list is `target_modules`."""
        named = self.config.get("target_modules")
        if isinstance(named, list):
            self.config["target_modules"] = matched_names(model, named) or named

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """Let peft inject its layers into `model`, take them out again, and make an adapter of each.

        Raises:
            TargetsNotFound: Peft finds no layer to adapt, or none for a name in the list `target_modules`.
            AdapterError: The model has layers of peft already, or peft cannot inject the method, or changes the inside
                of an adapted layer.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTunerLayer

        present = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        if present:
            raise AdapterError(f"{present[0]!r} is a layer of peft already; call unload() of peft's model first")
        config = self._build()
        kind = config.peft_type.value
        if kind == "ADALORA":
            config.rank_pattern = None  # it is read below; injecting takes the keys for those of LoRA's own setting
        for module in model.modules():
            if is_quantised(module):
                stop_repacking(module)  # peft reads its weight below
        with _restored(model):
            try:
                PEFT_TYPE_TO_TUNER_MAPPING[kind](model, config, adapter_name=_ADAPTER)
            except Exception as error:  # methods of peft raise many kinds
                missed = type(error).__name__ == "NoMatchingPeftModuleError"
                raise (TargetsNotFound if missed else AdapterError)(f"peft cannot inject {kind}: {error}") from error
            found = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        named = self.config.get("target_modules")
        unmatched = [n for n in named if n not in matched_names(model, named)] if isinstance(named, list) else []
        if unmatched:
            raise TargetsNotFound(
                f"Peft: {unmatched[0]!r} in target_modules matches no module of {type(model).__name__}."
                f"{near_misses(unmatched[:1], [t.name for t in places(model)])} Correct it or take it out"
            )
        for name in found:
            if any(inner.startswith(f"{name}.") for inner in found):
                raise AdapterError(f"peft changes the inside of {name!r} for {kind}; leave it out of target_modules")
        owned: set[int] = set()
        built = {name: PeftAdapter(tuner, name, owned) for name, tuner in found.items()}
        if kind == "ADALORA":
            allocation = AdaLoRAAllocation(self.config)
            for name, adapter in built.items():
                adapter.allocation, adapter.kept = allocation, allocation.kept(name)
        elif kind == "ADAMSS" and config.use_asa:
            warnings.warn("ADAMSS trains all subspaces here, and use_asa drops none", stacklevel=4)
            for adapter in built.values():
                adapter.allocation = AsaAllocation()
        return [(target, partial(built.__getitem__, target.name)) for target in places(model) if target.name in built]


def _without_class_path(config: Any) -> Any:
    """A configuration in its form of a recipe, `class_path: peft.IA3Config`, as the dictionary with `peft_type`."""
    if not isinstance(config, Mapping) or not str(config.get("class_path")).startswith("peft."):
        return config
    peft = require_peft()
    kind = getattr(peft, str(config["class_path"]).removeprefix("peft."), None)
    values = config.get("init_args") or {}
    if not (isinstance(kind, type) and issubclass(kind, peft.PeftConfig) and isinstance(values, Mapping)):
        return config
    names = (name for name, known in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if known is kind)
    return {**values, "peft_type": next((name.value for name in names), None)}


def _patterns(setting: str, value: Any) -> list[Any]:
    """The regular expressions in a setting: peft gives them to `re`. Lists hold names, but for layers_pattern."""
    if not setting.endswith(("_modules", "_pattern")):
        return []
    if isinstance(value, (list, tuple, set)):
        return list(value) if setting == "layers_pattern" else []
    return list(value) if isinstance(value, Mapping) else [value] if isinstance(value, str) else []


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as plain values that JSON can hold, without peft's notes on its origin."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.value if isinstance(value, Enum) else value

    values = {k: plain(v) for k, v in config.to_dict().items() if k not in ("auto_mapping", "peft_version")}
    values["inference_mode"] = False  # peft saves True in every adapter, which would freeze this one
    try:
        json.dumps(values)
    except TypeError as error:
        raise AdapterError(f"{values['peft_type']}: a value of the configuration cannot be saved: {error}") from error
    return values


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """After the block, the model has its own modules, parameters and requires_grad flags again."""
    own: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        own += [(table, dict(table)) for table in (module._modules, module._parameters, module._buffers)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for table, before in own:
            table.clear()
            table.update(before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        model.__dict__.pop("peft_config", None)
