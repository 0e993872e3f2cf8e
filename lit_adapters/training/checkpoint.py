"""What a checkpoint says of itself, and the refusal of checkpoints that a run cannot go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import RECORD, RECORD_FORMAT, describe
from lit_adapters.model.attach import attachment
from lit_adapters.renamed import current
from lit_adapters.training.attached import attached_models


def record(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of `module`, in plain values, so that nobody has to build it to read them.

    `module` is the class path; `models` has an entry for every attached model, by qualified name.
    """
    models = {
        name: describe(model) | {"trained": attachment(model).trained_parameters}
        for name, model in attached_models(module).items()
    }
    return {
        "format": RECORD_FORMAT,
        "version": version("lit-adapters"),
        "module": class_path(type(module)),
        "models": models,
    }


def class_path(cls: type) -> str:
    """Import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_format(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that does not come from a run with AdapterCallback, or from a newer version of it.

    Raises:
        AdapterError: so.
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


def check_class(checkpoint: Mapping[str, Any], cls: type, path: str | Path) -> None:
    """Refuse a checkpoint of another LightningModule class; a script's `__main__` may be any module.

    Raises:
        AdapterError: the classes differ.
    """
    written, present = current(checkpoint[RECORD]["module"]), class_path(cls)
    if written == present:
        return
    same_name = written.removeprefix("__main__.") == cls.__qualname__ or (
        cls.__module__ == "__main__" and written.endswith(f".{cls.__qualname__}")
    )
    if not same_name:
        raise AdapterError(f"{str(path)!r} is a checkpoint of {written}, the model is a {present}; give the run's own")


def check_methods(checkpoint: Mapping[str, Any], module: nn.Module, path: str | Path) -> None:
    """Refuse a checkpoint whose adapters differ from those of `module` in method, rank or any other setting.

    Raises:
        AdapterError: they differ; the message names both.
    """
    written, present = checkpoint[RECORD]["models"], record(module)["models"]
    if written.keys() != present.keys():
        raise AdapterError(
            f"{str(path)!r} has adapted models at {sorted(written)}, the module at {sorted(present)}; "
            "give the run's own"
        )
    for name, model in present.items():
        for key in ("methods", "train"):
            check_settings(written[name][key], model[key], path)


def check_settings(written: Any, present: Any, path: str | Path) -> None:
    """Refuse other methods, or other modules of `train`, than those written.

    Raises:
        AdapterError: they differ; the message names both.
    """
    written, present = (json.loads(json.dumps(side, default=str)) for side in (written, present))
    if written == present:
        return
    raise AdapterError(
        f"{str(path)!r} was trained with {_words(written, present)}, the model has {_words(present, written)}; "
        "resume with the settings it was trained with"
    )


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
