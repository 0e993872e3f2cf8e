"""Build models for the command line: a base model from a dotted path, an adapted one from its files.

What the user typed may be imported from anywhere. The LightningModule that a checkpoint names must be one of ours, or
have been imported already.

Dotted paths are resolved here and not by `pkgutil.resolve_name`, which passes over a submodule that fails to import
and then reports a missing attribute.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.class_paths import find_imported
from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.adapters import load_adapters, read_checkpoint_file
from lit_adapters.files.saved import is_directory, read_checkpoint
from lit_adapters.renamed import CLASSES, current
from lit_adapters.training.hyperparameters import KEY, built, check_plain, read_hyperparameters

# Classes that write checkpoints, in the applications beside the library.
_OURS = {"vision.module.ViTClassifier", "language.module.CausalLMTuner"} | {
    path for path in CLASSES.values() if path.endswith("Tuner")
}


def import_modules(names: Sequence[str]) -> None:
    """Import modules of the user's own, so that files may name their methods and LightningModules.

    Args:
        names: The values of the option --import.

    Raises:
        AdapterError: A module does not exist, or importing it fails.
    """
    for name in names:
        look_here_for(name)
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a user's module may raise
            raise AdapterError(f"--import {name!r} failed: {error!r}; give a module that can be imported") from error


def find_callable(path: str, option: str) -> Any:
    """The function or class that a dotted path names, such as `timm.create_model`.

    Modules are looked for where Python looks, and then in the working directory. The path must be one that the user
    typed, and none from a file: what it names is imported.

    Args:
        path: Modules, then attributes, as in `transformers.AutoModel.from_pretrained`.
        option: The name of the command-line option, for errors.

    Raises:
        AdapterError: Nothing has this path, its module does not import, or what it names cannot be called.
    """
    look_here_for(path)
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


def look_here_for(path: str) -> None:
    """Let Python find a module that the user typed in the working directory, if it is nowhere else."""
    top = path.split(".")[0]
    try:
        known = top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):  # no name of a module; importing it says so
        return
    if not known and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()


def recorded_module(path: str, file: Path) -> Any:
    """The class that a checkpoint names as the one that wrote it.

    Args:
        path: The class path that the checkpoint holds.
        file: The checkpoint, for errors.

    Raises:
        AdapterError: It is none of our applications' classes, and its module has not been imported.
    """
    if current(path) in _OURS:
        package = path.split(".")[0]
        _import_application(package, path, file)
        module, _, name = current(path).rpartition(".")
        return getattr(importlib.import_module(module), name)
    found = find_imported(path)
    if found is None:
        raise AdapterError(
            f"{str(file)!r} was written by {shown(path)}, which has not been imported: if you trust it, give "
            "--module with its class path, or --import with its module"
        )
    return found


def _import_application(name: str, path: str, file: Path) -> None:
    """Import `vision` or `language` from beside this library, and never from the working directory.

    Raises:
        AdapterError: It is not there.
    """
    if name in sys.modules:
        return
    folder = Path(__file__).resolve().parents[2] / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise AdapterError(
            f"{str(file)!r} was written by {path}, and {name!r} is not installed beside lit_adapters: if the one in "
            f"the working directory is yours, give --import {name}"
        )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


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
    kind = find_callable(module, "--module") if module else recorded_module(record["module"], path)
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise AdapterError(f"--module {module or record['module']!r} is not a LightningModule")
    settings = _settings(kind, path)
    try:
        loaded = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **settings)
    except AdapterError:
        raise
    except Exception as error:  # whatever a module's constructor may raise
        raise AdapterError(
            f"{kind.__name__} cannot load {str(path)!r}: {one_line(error)[:1000]}; if it needs other arguments "
            "than its checkpoint holds, load it in Python and call lit_adapters.save_adapters"
        ) from error
    (name,) = record["models"]
    return loaded.get_submodule(name), getattr(loaded, "tokenizer", None)


def _settings(kind: type, path: Path) -> dict[str, Any]:
    """What to give to `load_from_checkpoint` of a class that does not check its hyperparameters itself.

    Raises:
        AdapterError: A hyperparameter is more than a plain value, a method or a schedule.
    """
    checkpoint = read_checkpoint_file(path)
    values = read_hyperparameters(checkpoint, path)
    for name, value in values.items():
        check_plain(name, value, path)
    if "_instantiator" not in checkpoint.get(KEY, {}) or hasattr(kind, "from_file"):
        return {}
    # LightningCLI wrote it: its parser would build whatever the values name. The constructor gets them as they are.
    return {"_instantiator": None} | {name: built(value) for name, value in values.items()}
