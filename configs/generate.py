"""Write the recipes: `python -m configs.generate` fills configs/source/recipe.yaml for each folder, method and task.

The recipes are complete files, so that a person can read and copy any of them. What they share is written once, in
configs/source: the text of a recipe with holes (`$name`), and the values for the holes, most general first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent
SOURCE = CONFIGS / "source"
_HOLE = re.compile(r"\$(\w+)")


def read(name: str) -> dict[str, dict[str, Any]]:
    """The blocks of a file in configs/source. Scalars stay text, so that 1.0e-3 is written as 1.0e-3."""
    blocks: dict[str, dict[str, Any]] = yaml.load((SOURCE / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return blocks


def values(block: dict[str, Any], folder: str) -> dict[str, str]:
    """The values that a block has for recipes in `folder`: its own, then those of the application and the folder."""
    merged = {**block, **block.get(_application(folder), {}), **block.get(folder, {})}
    return {name: value for name, value in merged.items() if isinstance(value, str)}


def fill(text: str, names: dict[str, str]) -> str:
    """Fill the holes of a text, and the holes in what has been filled in.

    A value of several lines repeats what stands before its hole: spaces or a comment sign. A line with an empty hole is
    left out.

    Raises:
        ValueError: A hole has no value.
    """
    lines = text.splitlines()
    done: list[str] = []
    while lines:
        line = lines.pop(0)
        hole = _HOLE.search(line)
        if hole is None:
            done.append(line)
            continue
        if hole[1] not in names:
            raise ValueError(f"no block in configs/source has a value for ${hole[1]} in the line {line!r}")
        before, after = line[: hole.start()], line[hole.end() :]
        lines = [f"{before}{part}{after}" for part in names[hole[1]].splitlines()] + lines
    return "\n".join(done) + "\n"


def recipes() -> dict[str, str]:
    """All recipes: path within configs/, without .yaml, and text."""
    template = (SOURCE / "recipe.yaml").read_text(encoding="utf-8")
    folders, methods, tasks = read("folders.yaml"), read("methods.yaml"), read("tasks.yaml")
    written = {}
    for folder in (name for name in folders if "/" in name):
        block = folders[folder]
        general = [folders["common"], folders[_application(folder)], folders[block.get("like", folder)], block]
        for task in tasks.values():
            for name, method in methods.items():
                if folder in _folders(task, name, method, folders):
                    names = {"folder": folder, "method": name}
                    for part in (*general, method, task):
                        names |= values(part, folder)
                    path = fill(f"{folder}/$file", names).strip()
                    written[path] = fill(template, names)
    return written


def _application(folder: str) -> str:
    return folder.split("/")[0]


def _folders(task: dict[str, Any], name: str, method: dict[str, Any], folders: Iterable[str]) -> list[str]:
    """The folders that get a recipe for this task and method."""
    if task["methods"] != "all" and name not in task["methods"]:
        return []
    places = method["folders"] if task["methods"] == "all" else task["folders"]
    return [folder for folder in folders if folder in places or _application(folder) in places]


def main() -> None:
    """Write all recipes."""
    texts = recipes()
    for path, text in texts.items():
        (CONFIGS / path).parent.mkdir(parents=True, exist_ok=True)
        (CONFIGS / f"{path}.yaml").write_text(text, encoding="utf-8")
    print(f"{len(texts)} recipes written")


if __name__ == "__main__":
    main()
