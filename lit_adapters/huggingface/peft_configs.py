"""Configurations of our methods in the form that peft reads and writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig

import lit_adapters as la
from lit_adapters.errors import AdapterError
from lit_adapters.methods.method import Method


class MethodType(str):
    """The name of a method in peft's tables, where others have a member of `PeftType`."""

    @property
    def value(self) -> str:
        """As the members of an enumeration have it."""
        return str(self)


@dataclass
class MethodConfig(PeftConfig):  # type: ignore[misc]
    """The settings of a method of this library for `peft.get_peft_model`.

    A subclass has the method's own settings as further fields, with the same names and defaults; see the method.

    Args:
        target_modules: Names or suffixes of the adapted modules, a regular expression for whole names, or "all-linear";
            by default what the method adapts in `lit_adapters.attach`.
        exclude_modules: Names or suffixes to leave alone.
        modules_to_save: Modules that train as a whole, and are saved with the adapter.

    Raises:
        AdapterError: A setting of the method is out of range.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None

    method_class: ClassVar[type[Method]]
    peft_type_name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = MethodType(self.peft_type_name)
        if isinstance(self.exclude_modules, str):
            raise AdapterError(f"exclude_modules {self.exclude_modules!r} must be a list of name suffixes")
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = sorted(self.target_modules)
        # Plain values, as the file holds them.
        settings = self.method().to_config()["init_args"]
        for name in _settings(self.method_class):
            setattr(self, name, settings[name])

    @classmethod
    def takes_targets(cls) -> bool:
        """Whether the method has targets of its own; a composition of methods has none."""
        return "targets" in _fields(cls.method_class)

    def method(self) -> Method:
        """The method with these settings."""
        arguments = {name: getattr(self, name) for name in _settings(self.method_class)}
        if self.takes_targets():
            if self.target_modules not in (None, "all-linear"):
                arguments["targets"] = self.target_modules
            arguments["exclude"] = list(self.exclude_modules or ())
        elif self.target_modules is not None or self.exclude_modules:
            raise AdapterError(
                f"{type(self).__name__} has several parts: give each its own targets and exclude, and no target_modules"
            )
        return self.method_class(**arguments)


def _fields(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(method)}  # type: ignore[arg-type]


def _settings(method: type[Method]) -> list[str]:
    """The names of a method's settings, without those that peft has its own names for."""
    return [name for name in _fields(method) if name not in ("targets", "exclude")]


def _config_of(method: type[Method]) -> type[MethodConfig]:
    fields: list[Any] = []
    for name in _settings(method):
        own = _fields(method)[name]
        made = own.default_factory is not dataclasses.MISSING
        default = field(default_factory=own.default_factory) if made else field(default=own.default)  # type: ignore[arg-type]
        fields.append((name, Any, default))
    namespace = {
        "method_class": method,
        "peft_type_name": f"LIT_{method.__name__.upper()}",
        "__doc__": f"`lit_adapters.{method.__name__}` for peft; see there for the settings, and `MethodConfig`.",
        "__module__": __name__,
    }
    return dataclasses.make_dataclass(f"{method.__name__}Config", fields, bases=(MethodConfig,), namespace=namespace)


NoRAConfig = _config_of(la.NoRA)
NoRAPlusPlusConfig = _config_of(la.NoRAPlusPlus)
LoRANConfig = _config_of(la.LoRAN)
AFALoRAConfig = _config_of(la.AFALoRA)
GroupAffineConfig = _config_of(la.GroupAffine)
LoRA2Config = _config_of(la.LoRA2)
NestedLoRAConfig = _config_of(la.NestedLoRA)

CONFIGS = (
    NoRAConfig,
    NoRAPlusPlusConfig,
    LoRANConfig,
    AFALoRAConfig,
    GroupAffineConfig,
    LoRA2Config,
    NestedLoRAConfig,
)
