"""Hyperparameters of a checkpoint: plain values, from which nothing is built but adapter methods and schedules.

A checkpoint may come from someone else. Its hyperparameters become arguments of a constructor, and the command line's
parser would import and build whatever class path stands in them. So they are checked before anything sees them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import Tensor

from lit_adapters.class_paths import build, find_imported
from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.method import Method, to_methods
from lit_adapters.schedules import Schedule

KEY = "hyper_parameters"
# Entries that tell Lightning how to build a module. Checkpoints of a user's own modules may have the first.
BUILDERS = ("_instantiator", "_class_path")
_OLD_KEYS = ("hparams", "module_arguments")  # names in Lightning 0.7, which present versions still read
TRUST = "trust_remote_code"  # an argument of modules that no file may hold
_DEEPEST = 30
_PLAIN = (type(None), bool, int, float, str, Tensor, torch.dtype, torch.device, torch.Size)


def read_hyperparameters(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The hyperparameters of a checkpoint, by name, without what tells Lightning how to build the module.

    Args:
        checkpoint: As it was read, with weights_only.
        path: The file, for messages.

    Raises:
        AdapterError: They are not values by name, or have moved to where only old versions of Lightning had them.
    """
    old = [key for key in (*_OLD_KEYS, "hparams_type") if checkpoint.get(key) and key != KEY]
    if checkpoint.get("hparams_name") not in (None, "kwargs"):
        old.append("hparams_name")
    if old:
        raise AdapterError(
            f"{str(path)!r} has hyperparameters under {old[0]!r}, as no run of ours writes them; it was changed after "
            "training, or comes from an old version of Lightning: take another checkpoint"
        )
    found = checkpoint.get(KEY, {})
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise AdapterError(f"{str(path)!r}: its {KEY} are {shown(found)}, not values by name; take another checkpoint")
    if TRUST in found:
        raise AdapterError(
            f"{str(path)!r} says by {TRUST} that a model may run code of its own, which no run writes and only you can "
            "say, in the recipe or as an argument; take another checkpoint"
        )
    return {name: value for name, value in found.items() if name not in BUILDERS}


def check_trust(given: Mapping[str, Any]) -> None:
    """Refuse arguments that trust the code of a model which only a file names.

    Args:
        given: The arguments that the user gives.

    Raises:
        AdapterError: They hold `trust_remote_code` and no model.
    """
    if given.get(TRUST) and "model" not in given:
        raise AdapterError(f"{TRUST} goes with the name of the model that you trust, and the checkpoint's is not yours")


def check_plain(name: str, value: Any, path: str | Path) -> None:
    """Refuse a hyperparameter that is more than plain values, methods and schedules in their forms.

    Args:
        name: The hyperparameter.
        value: What the checkpoint holds.
        path: The file, for messages.

    Raises:
        AdapterError: It holds a function or class, a class path that is neither a method nor a schedule that has been
            imported, or is nested too deeply.
    """
    try:
        _check_plain(value, _DEEPEST)
    except AdapterError as error:
        raise AdapterError(
            f"{str(path)!r}: the checkpoint's hyperparameter {shown(name)} is refused: {error}. If you trust it, give "
            "its value yourself, in the recipe or as an argument"
        ) from error


def _check_plain(value: Any, depth: int) -> None:
    if depth == 0:
        raise AdapterError("it is nested too deeply")
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise AdapterError(f"keys of {shown(dict(value))} must be text")
        if "class_path" in value:
            _check_class(value)
        for inner in value.values():
            _check_plain(inner, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, torch.Size):
        for inner in value:
            _check_plain(inner, depth - 1)
    elif not isinstance(value, _PLAIN):
        raise AdapterError(f"{shown(value)} is no plain value")


def _check_class(value: Mapping[Any, Any]) -> None:
    path = value["class_path"]
    found = None
    if isinstance(path, str):
        found = find_imported(path if "." in path else f"lit_adapters.{path}")
        found = found or find_imported(f"lit_adapters.schedules.{path}")
    if not (isinstance(found, type) and issubclass(found, (Method, Schedule))):
        raise AdapterError(f"class_path {shown(path)} is neither a method nor a schedule that has been imported")


def built(value: Any) -> Any:
    """A checked value with its methods and schedules as objects in place of their forms.

    Raises:
        AdapterError: A class refuses its arguments.
    """
    if isinstance(value, Mapping):
        if "class_path" in value:
            found = find_imported(value["class_path"])
            if isinstance(found, type) and issubclass(found, Schedule):
                return build(value, Schedule, "lit_adapters.schedules", "schedule")  # type: ignore[type-abstract]
            return to_methods(value)[0]
        return {key: built(inner) for key, inner in value.items()}
    return [built(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def constructor_types(cls: type) -> dict[str, Any]:
    """The parameters of a constructor with their types; those of the base classes too, where it passes `**kwargs` on.

    A type that cannot be told is `Any`.
    """
    found: dict[str, Any] = {}
    for kind in cls.__mro__:
        own = kind.__dict__.get("__init__")
        if own is None:
            continue
        try:
            hints = typing.get_type_hints(own)
        except (NameError, TypeError, AttributeError):
            hints = {}
        parameters = list(inspect.signature(own).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hint = hints.get(parameter.name, Any)
                optional = parameter.default is None and hint is not Any
                found.setdefault(parameter.name, Union[hint, None] if optional else hint)  # noqa: UP007 - any hint
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def canonical(name: str, value: Any, hint: Any, path: str | Path) -> Any:
    """A hyperparameter in the form that recipes have, if it is plain and fits the constructor's type.

    Methods and schedules are built once, so that their own checks run and only paths of known classes are left.

    Args:
        name: The hyperparameter.
        value: What the checkpoint holds.
        hint: The type of the parameter of that name.
        path: The file, for messages.

    Raises:
        AdapterError: It is not plain or does not fit.
    """
    check_plain(name, value, path)
    if not fits(value, hint):
        raise AdapterError(
            f"{str(path)!r}: the checkpoint's hyperparameter {name} is {shown(value)}, which the module does not take "
            "from a file; take another checkpoint, or give the value yourself"
        )
    try:
        return _forms(value)
    except AdapterError as error:
        raise AdapterError(f"{str(path)!r}: the checkpoint's hyperparameter {name} is refused: {error}") from error


def arguments_from(
    cls: type, checkpoint: Mapping[str, Any], path: str | Path, given: Iterable[str] = ()
) -> dict[str, Any]:
    """The arguments of a constructor that a checkpoint holds, in plain form.

    Args:
        cls: The class of the module.
        checkpoint: As it was read, with weights_only.
        path: The file, for messages.
        given: Names of arguments that the user gives; the file's are not looked at.

    Raises:
        AdapterError: A value is not plain, has another type than the argument, or names what is neither ours nor
            imported.
    """
    hints, skipped = constructor_types(cls), set(given)
    values = read_hyperparameters(checkpoint, path)
    return {
        name: canonical(name, value, hints.get(name, Any), path)
        for name, value in values.items()
        if name not in skipped
    }


def _forms(value: Any) -> Any:
    if isinstance(value, Mapping):
        return (
            built(value).to_config() if "class_path" in value else {key: _forms(inner) for key, inner in value.items()}
        )
    return [_forms(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has a type; False for types whose values no file may hold.

    Args:
        value: What the file holds; methods and schedules are in their forms.
        hint: The type, as an annotation of a parameter gives it.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if (origin or hint) in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        items = [item for item in inner if item is not Ellipsis]
        return isinstance(value, (list, tuple)) and all(any(fits(v, i) for i in items or [Any]) for v in value)
    if (origin or hint) in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(fits(v, inner[1] if inner else Any) for v in value.values())
    if not isinstance(hint, type):
        return False
    if hint is Path:
        return isinstance(value, str)
    if issubclass(hint, (Method, Schedule)):
        return isinstance(value, Mapping) and _names(value, hint)
    if dataclasses.is_dataclass(hint):
        return _fits_fields(value, hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint and hint in _PLAIN


def _names(value: Mapping[Any, Any], kind: type) -> bool:
    path = value.get("class_path")
    found = find_imported(path) if isinstance(path, str) else None
    return isinstance(found, type) and issubclass(found, kind)


def _fits_fields(value: Any, hint: Any) -> bool:
    fields = {field.name: field for field in dataclasses.fields(hint)}
    needed = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if not isinstance(value, Mapping) or not needed <= value.keys() <= fields.keys():
        return False
    hints = typing.get_type_hints(hint)
    return all(fits(inner, hints[name]) for name, inner in value.items())
