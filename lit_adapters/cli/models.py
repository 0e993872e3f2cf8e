"""Models for the command line: a base by the path of what makes it, an adapted model by its directory or checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import load_adapters
from lit_adapters.files.saved import is_directory, read_checkpoint


def find_callable(path: str, option: str) -> Any:
    """What a dotted path names, such as `timm.create_model` or `transformers.AutoModel.from_pretrained`.

    Modules are looked for where Python looks, and then in the working directory.

    Args:
        path: modules, then attributes.
        option: the name of the command-line option, for errors.

    Raises:
        AdapterError: there is no such thing, it cannot be called, or its module does not import.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # whatever a user's module may raise
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                continue
            raise AdapterError(f"{option} {path!r}: importing {module!r} failed: {error!r}") from error
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                raise AdapterError(f"{option} {path!r}: {module!r} has no {'.'.join(parts[length:])!r}")
            found = getattr(found, attribute)
        if callable(found):
            return found
        raise AdapterError(f"{option} {path!r} is a {type(found).__name__}, nothing that makes a model")
    raise AdapterError(
        f"{option} {path!r} does not exist: give the whole path of something importable, as timm.create_model"
    )


def build_base(path: str, arguments: str | None) -> nn.Module:
    """Call what `path` names; `arguments` is JSON, a list of positional or an object of keyword arguments.

    Raises:
        AdapterError: the JSON is not valid, the path names nothing, the call fails, or gives no model.
    """
    try:
        values = json.loads(arguments) if arguments else {}
    except ValueError as error:
        raise AdapterError(f"--base-args {arguments!r} is not valid JSON: {error}") from error
    if not isinstance(values, (list, dict)):
        raise AdapterError(f"--base-args {arguments!r} must be a JSON list or object, as '{{\"num_classes\": 10}}'")
    make = find_callable(path, "--base")
    try:
        model = make(*values) if isinstance(values, list) else make(**values)
    except AdapterError:
        raise
    except Exception as error:  # whatever a maker of models may raise
        raise AdapterError(f"--base {path}, called with {values}, failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise AdapterError(f"--base {path} made a {type(model).__name__}, not a torch model")
    return model


def adapted_model(path: Path, base: str | None, arguments: str | None, module: str | None) -> tuple[nn.Module, Any]:
    """The model with the adapters of a directory or checkpoint, and its tokenizer if the checkpoint's module has one.

    Args:
        path: an adapter directory, for which `base` is needed, or a checkpoint, for which it is not.
        base: path of what makes the base model.
        arguments: of it, JSON.
        module: class path of the LightningModule; by default the one that wrote the checkpoint.

    Raises:
        AdapterError: a missing or unfitting option, and all that reading and building may find wrong.
    """
    if is_directory(path):
        if base is None or module is not None:
            raise AdapterError(
                f"{str(path)!r} is an adapter directory: give --base and --base-args, which make its base model"
            )
        model = build_base(base, arguments)
        load_adapters(model, path.parent if path.is_file() else path)
        return model, None
    if base is not None or arguments is not None:
        raise AdapterError(f"{str(path)!r} is a checkpoint, and builds its model itself: leave out --base")
    record, _ = read_checkpoint(path)
    if len(record["models"]) > 1:
        names = ", ".join(map(repr, record["models"]))
        raise AdapterError(f"{str(path)!r} has several adapted models ({names}); load it in Python and give the one")
    kind = find_callable(module or record["module"], "--module")
    if not hasattr(kind, "load_from_checkpoint"):
        raise AdapterError(f"--module {module or record['module']!r} is no LightningModule")
    try:
        loaded = kind.load_from_checkpoint(path, map_location="cpu")
    except AdapterError:
        raise
    except Exception as error:  # whatever a module's constructor may raise
        raise AdapterError(
            f"{kind.__name__} cannot load {str(path)!r}: {one_line(error)}; if it needs other arguments than its "
            "checkpoint holds, load it in Python and call lit_adapters.save_adapters"
        ) from error
    (name,) = record["models"]
    return loaded.get_submodule(name), getattr(loaded, "tokenizer", None)
