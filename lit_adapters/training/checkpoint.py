"""What a checkpoint holds and says of itself, and the refusal of checkpoints that a run cannot go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import describe
from lit_adapters.files.checkpoint_schema import RECORD, RECORD_FORMAT
from lit_adapters.methods.method import to_methods
from lit_adapters.model.record import attachment, frozen_keys
from lit_adapters.renamed import current, recorded
from lit_adapters.training.attached import attached_models


def redundant_keys(module: nn.Module) -> set[str]:
    """Keys that a checkpoint need not hold: frozen parameters of attached models, which strict loading forgives."""
    models = attached_models(module).items()
    return {f"{name}.{key}" if name else key for name, model in models for key in frozen_keys(model)}


def record(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of `module`, in plain values, so that nobody has to build it to read them.

    Returns:
        `module`, the class path; `models`, what `attach` did to each attached model, by qualified name; `format` and
        `version` of the record.
    """
    return {
        "format": RECORD_FORMAT,
        "version": version("lit-adapters"),
        "module": recorded(class_path(type(module))),
        "models": _models(module),
    }


def _models(module: nn.Module) -> dict[str, Any]:
    return {
        name: describe(model) | {"trained": attachment(model).trained_parameters}
        for name, model in attached_models(module).items()
    }


def class_path(cls: type) -> str:
    """Import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_model(checkpoint: Mapping[str, Any], module: nn.Module, path: str | Path) -> None:
    """Refuse a checkpoint that `module` cannot go on from.

    Args:
        checkpoint: As it was read.
        module: The one that trains, with its adapters.
        path: Where the checkpoint was read, for the message.

    Raises:
        AdapterError: The checkpoint has no record or one of a newer format, or was written by another class, or with
            adapted models, methods or modules of `train` that differ; the message names both sides.
    """
    written = _check_class(checkpoint, type(module), path)
    present = _models(module)
    if written.keys() != present.keys():
        raise AdapterError(
            f"{str(path)!r} has adapted models at {sorted(written)}, the module at {sorted(present)}; "
            "give the run's own"
        )
    for name, model in present.items():
        for key in ("methods", "train"):
            check_settings(written[name][key], model[key], path)


def check_recipe(
    checkpoint: Mapping[str, Any], cls: type | None, methods: list[dict[str, Any]] | None, path: str | Path
) -> None:
    """Refuse a checkpoint that a recipe cannot go on from, before any model is built.

    Args:
        checkpoint: As it was read.
        cls: The class of the module that the recipe trains; None where it is not known yet.
        methods: The recipe's, in their `{class_path, init_args}` forms; None where the module takes none.
        path: Where the checkpoint was read, for the message.

    Raises:
        AdapterError: The checkpoint has no record or one of a newer format, or was written by another class or with
            other methods; the message names both sides.
    """
    written = _check_class(checkpoint, cls, path)
    for model in written.values() if methods is not None else ():
        check_settings(model["methods"], methods, path)


def _check_class(checkpoint: Mapping[str, Any], cls: type | None, path: str | Path) -> Mapping[str, Any]:
    """The models of the record, if its format is known and its class is `cls`; a script's `__main__` may be any module.

    Raises:
        AdapterError: No record, a record of a newer format, or another class.
    """
    found = checkpoint.get(RECORD) if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, Mapping) or "format" not in found:
        raise AdapterError(
            f"{str(path)!r} was not written by a run with this version of AdapterCallback and cannot be resumed bit "
            "for bit; start a new run, or load its weights with load_from_checkpoint"
        )
    if found["format"] > RECORD_FORMAT:
        raise AdapterError(
            f"{str(path)!r} has format {found['format']}, written by lit-adapters {found.get('version')}; "
            f"this version reads up to {RECORD_FORMAT}: update lit-adapters"
        )
    written = current(found["module"])
    if cls is not None and not _same_class(written, cls):
        raise AdapterError(
            f"{str(path)!r} is a checkpoint of {written}, the model is a {class_path(cls)}; give the run's own"
        )
    models: Mapping[str, Any] = found["models"]
    return models


def _same_class(written: str, cls: type) -> bool:
    return (
        written == class_path(cls)
        or written.removeprefix("__main__.") == cls.__qualname__
        or (cls.__module__ == "__main__" and written.endswith(f".{cls.__qualname__}"))
    )


def check_settings(written: Any, present: Any, path: str | Path) -> None:
    """Refuse other methods, or other modules of `train`, than those written.

    Raises:
        AdapterError: They differ; the message names both.
    """
    written, present = (json.loads(json.dumps(side, default=str)) for side in (_complete(written), present))
    if written == present:
        return
    raise AdapterError(
        f"{str(path)!r} was trained with {_words(written, present)}, the model has {_words(present, written)}; "
        "resume with the settings it was trained with"
    )


def _complete(settings: Any) -> Any:
    """Methods with the defaults of settings that an earlier version did not write; anything else as it is."""
    if not _are_methods(settings):
        return settings
    try:
        return [method.to_config() for method in to_methods(settings)]
    except AdapterError:  # not a method of this program: compared as it was written
        return settings


def _words(own: Any, other: Any) -> str:
    """A setting in the words of a recipe: only what differs, where that is enough."""
    if not (_are_methods(own) and _are_methods(other)):
        return f"train={own}"
    names, others = ([_class_name(m) for m in side] for side in (own, other))
    if names != others:
        return " and ".join(names) or "no adapters"
    return " and ".join(_arguments(a, b) for a, b in zip(own, other, strict=True) if a != b)


def _are_methods(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and "class_path" in v for v in value)


def _arguments(method: dict[str, Any], other: dict[str, Any]) -> str:
    """`LoRA(rank=2)`: the arguments in which `method` differs from `other`, into nested methods and schedules."""
    own, others = method.get("init_args") or {}, other.get("init_args") or {}
    shown = []
    for key, value in own.items():
        if key in others and others[key] == value:
            continue
        nested = isinstance(value, dict) and "class_path" in value and isinstance(others.get(key), dict)
        shown.append(f"{key}={_arguments(value, others[key]) if nested else repr(value)}")
    return f"{_class_name(method)}({', '.join(shown)})"


def _class_name(method: dict[str, Any]) -> str:
    return str(method["class_path"]).rpartition(".")[2]
