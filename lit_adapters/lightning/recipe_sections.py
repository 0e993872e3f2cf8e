"""Checks of a recipe's sections that jsonargparse leaves out: it drops an empty section, whatever its name is.

Without these checks `modle: {}`, `adapters: {}` and `trainer: []` would be ignored without a word.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_adapters.class_paths import find_imported
from lit_adapters.errors import AdapterError, shown
from lit_adapters.training.hyperparameters import constructor_types

_CLASSES = ("optimizer", "lr_scheduler")  # sections with a class path
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def recipes(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The recipes that a command line names, as plain values, with their paths; what YAML cannot read is left out."""
    for position, word in enumerate(args):
        option, given, path = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if not given:
            path = args[position + 1] if position + 1 < len(args) else ""
        try:
            if Path(path).is_file():
                yield path, yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue  # the parser says what is wrong


def check_sections(document: Any, known: Collection[str], classes: Mapping[str, type], origin: str) -> None:
    """Check the names and types of a recipe's sections, and every empty mapping in them.

    Args:
        document: The recipe.
        known: The names of sections.
        classes: The classes that sections hold the arguments of, by section.
        origin: The file, for messages.

    Raises:
        AdapterError: A section, or an argument without a value, is unknown; or a mapping is empty where something is
            to be built from it.
    """
    if not isinstance(document, Mapping):
        return
    for name, section in document.items():
        if name not in known:
            if section in ({}, [], None):
                raise AdapterError(f"{origin}: section {shown(name)} is unknown{_nearest(name, known)}")
            continue
        if name in _CLASSES and section == {}:
            raise AdapterError(f"{origin}: section {name!r} is empty: give class_path, or leave the section out")
        if name not in classes:
            continue
        if not isinstance(section, (Mapping, str)) and not (section is None and name == "trainer"):
            raise AdapterError(f"{origin}: section {name!r} is {shown(section)}, and must hold values by name")
        _check_arguments(section, classes[name], name, origin)
    for name in _CLASSES:
        _check_inside(document.get(name), name, origin)


def _check_arguments(values: Any, cls: type, where: str, origin: str) -> None:
    if not isinstance(values, Mapping):
        return
    if "class_path" in values:
        _check_inside(values, where, origin)
        return
    hints = constructor_types(cls)
    for name, value in values.items():
        if value == {} and isinstance(value, Mapping):
            if name not in hints:
                raise AdapterError(f"{origin}: {where}.{name} is unknown{_nearest(name, hints)}")
            if not _takes_mappings(hints[name]):
                raise AdapterError(f"{origin}: {where}.{name} is empty: give its value, or leave it out")
        elif isinstance(value, list) and {} in value and name in hints and not _takes_mappings(hints[name]):
            raise AdapterError(f"{origin}: {where}.{name} has an empty entry: give its class_path, or leave it out")
        _check_inside(value, f"{where}.{name}", origin)


def _check_inside(value: Any, where: str, origin: str) -> None:
    """Check the arguments of classes inside a value, of those that have been imported."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check_inside(inner, f"{where}[{index}]", origin)
    elif isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        path = value["class_path"]
        found = find_imported(path if "." in path else f"lit_adapters.{path}")
        if isinstance(found, type):
            _check_arguments(value.get("init_args"), found, f"{where}.init_args", origin)


def _takes_mappings(hint: Any) -> bool:
    if hint is Any or (typing.get_origin(hint) or hint) in _MAPPINGS or dataclasses.is_dataclass(hint):
        return True
    return any(_takes_mappings(inner) for inner in typing.get_args(hint))


def _nearest(name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]!r}?" if near else f": use {', '.join(sorted(known))}"
