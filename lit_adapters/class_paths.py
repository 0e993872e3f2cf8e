"""Classes by the import paths that files and dictionaries hold, found without importing anything.

A checkpoint or an adapter directory may come from someone else, and importing a module runs it. So a path is looked up
among the modules that have been imported already: those of this library, and what the user's program has imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from lit_adapters.errors import AdapterError, shown
from lit_adapters.renamed import current

T = TypeVar("T")


def find_imported(path: str) -> Any:
    """What an import path names, looked up in `sys.modules` alone; None if there is nothing.

    Args:
        path: Modules, then attributes, as in "my_package.methods.Mine". It may have an old name of one of our modules.
    """
    parts = current(path).split(".")
    for length in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:length]))
        if found is None:
            continue
        for name in parts[length:]:
            # `vars` and not `getattr`, with which a lazy module would import what is asked for.
            found = vars(found).get(name) if isinstance(found, (ModuleType, type)) else None
        return found
    return None


def build(config: Any, base: type[T], package: str, what: str) -> T:
    """Build an object from its `{class_path, init_args}` form.

    Args:
        config: The form; a class path without a dot names a class of `package`.
        base: The class must be a subclass of this one.
        package: Where the library's own classes are.
        what: What objects of `base` are called, such as "adapter method".

    Raises:
        AdapterError: `config` has no class path, nothing that has been imported has this path, it names no subclass of
            `base`, or the class refuses the arguments.
    """
    if not isinstance(config, Mapping) or "class_path" not in config:
        raise AdapterError(f"the form of {what}s needs 'class_path' (and 'init_args'), got {shown(config)}")
    path, arguments = config["class_path"], config.get("init_args")
    if not isinstance(path, str):
        raise AdapterError(f"class_path {shown(path)} must be text that names one {what}, such as '{package}.NAME'")
    if not (arguments is None or isinstance(arguments, Mapping)):
        raise AdapterError(f"{shown(path)}: init_args {shown(arguments)} must be arguments by name")
    cls = find_imported(path if "." in path else f"{package}.{path}")
    if cls is None:
        module = path.rpartition(".")[0]
        ours = module.split(".")[0] in ("", "lit_adapters")
        fix = f"give one of {package}" if ours else f"if it is yours, import {shown(module)} before (see --import)"
        raise AdapterError(f"no {what} {shown(path)} is known: {fix}")
    if not (isinstance(cls, type) and issubclass(cls, base) and cls is not base):
        raise AdapterError(f"{shown(path)} is no {what}; give one of {package}")
    try:
        return cls(**(arguments or {}))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except RecursionError as error:
        raise AdapterError(f"{path}: the arguments are nested too deeply; give those of one {what}") from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise AdapterError(f"{path}: {error}; correct its init_args") from error
