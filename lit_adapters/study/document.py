"""YAML files of studies and recipes, read strictly: a key that is given twice is an error, and so is a wrong shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown


class _Loader(yaml.SafeLoader):
    """Loads plain values; of a key that is given twice, YAML itself would drop the first one silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(path: Path, missing: str) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        missing: What to say after the path if there is no such file.

    Raises:
        AdapterError: The file is missing, is not YAML, has a key twice, or holds itself.
    """
    try:
        # The loader is a SafeLoader.
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        json.dumps(document, default=str, skipkeys=True)  # ValueError if an anchor holds itself
    except FileNotFoundError as error:
        raise AdapterError(f"{path} {missing}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AdapterError(f"{path} cannot be read: {one_line(error)}") from error
    return document


def check_shape(document: Any, cls: type, sections: Mapping[str, type], path: Path, where: str = "") -> None:
    """Check names in a section and those inside it, and that lists and sections are such.

    jsonargparse passes over unknown names without a value, and says little of lists.

    Args:
        document: The section.
        cls: Its dataclass.
        sections: The dataclasses of sections by name, wherever they stand.
        path: The file, for messages.
        where: The section's place in the file.

    Raises:
        AdapterError: A name is unknown, a value is missing, or a value is not the list or section that it must be.
    """
    place = where or "a study"
    if not isinstance(document, Mapping):
        raise AdapterError(f"{path}: {place} is {shown(document)}; give a section of names and values")
    types = {f.name: str(f.type) for f in fields(cls) if f.name != "path"}
    for name, value in document.items():
        if name not in types:
            section = f"section {where}" if where else place
            raise AdapterError(f"{path}: {shown(name)} is unknown; {section} has {', '.join(types)}")
        key = f"{where}.{name}".strip(".")
        _check_kind(value, types[name], f"{path}: {key}")
        inner = sections.get(name)
        if inner is None or value is None:
            continue
        if name == "arms":
            for arm, part in value.items():
                check_shape({} if part is None else part, inner, sections, path, f"{key}.{arm}")
        elif types[name].startswith("list"):
            for part in value:
                check_shape(part, inner, sections, path, key)
        else:
            check_shape(value, inner, sections, path, key)


def _check_kind(value: Any, annotation: str, what: str) -> None:
    if value is None:
        if "None" not in annotation:
            raise AdapterError(f"{what} is empty; give a value, or leave it out if it is not needed")
    elif annotation.startswith("list") and not isinstance(value, list):
        raise AdapterError(f"{what} is {shown(value)}; give a list, such as [a, b]")
    elif annotation.startswith("dict"):
        if not isinstance(value, Mapping):
            raise AdapterError(f"{what} is {shown(value)}; give a section of names and values")
        for key in value:
            if not isinstance(key, str) or not all(key.split(".")):
                raise AdapterError(f"{what}: {shown(key)} is not a key; give names with dots between them")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values in nested sections."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key
