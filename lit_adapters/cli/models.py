"""Build models for the command line: a base model from a dotted path, an adapted one from its files.

Dotted paths are resolved here and not by `pkgutil.resolve_name`, which passes over a submodule that fails to import
and then reports a missing attribute.
"""

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
    """The function or class that a dotted path names, such as `timm.create_model`.

    Modules are looked for where Python looks, and then in the working directory.

    Args:
        path: Modules, then attributes, as in `transformers.AutoModel.from_pretrained`.
        option: The name of the command-line option, for errors.

    Raises:
        AdapterError: Nothing has this path, its module does not import, or what it names cannot be called.
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
    """Call the function or class that `path` names.

    Args:
        path: Its dotted path.
        arguments: JSON: a list of positional arguments, or an object of keyword arguments.

    Raises:
        AdapterError: The JSON is not valid, nothing has this path, the call fails, or it does not return a model.
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
        path: An adapter directory, which needs `base`, or a checkpoint, which builds its model itself.
        base: The dotted path of the function or class that makes the base model.
        arguments: The arguments of that call, as JSON.
        module: The class path of the LightningModule; by default the one that wrote the checkpoint.

    Raises:
        AdapterError: An option is missing or does not go with `path`, or reading or building fails.
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
        raise AdapterError(f"--module {module or record['module']!r} is not a LightningModule")
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
