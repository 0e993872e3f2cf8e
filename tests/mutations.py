"""Damaged and hostile inputs, made from valid ones by a seeded random generator."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

# What an edit puts in the place of a value: other types, other signs, extremes, and text that names code.
STRANGE = [
    None,
    True,
    0,
    -1,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "no such name",
    "a" * 100_000,
    "\ud83d",
    "../../etc/passwd",
    "os.system",
    [],
    {},
    [None],
    [[]],
    {"": None},
    {"class_path": "subprocess.Popen", "init_args": {"args": "false"}},
]


def json_edits(document: Any, count: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield edited copies of a JSON document, with a description of each edit.

    An edit removes an entry, puts a strange value in its place, wraps it in a list, doubles it, renames its key, adds
    an unknown key, or nests a value 300 lists deep. A document that is no list and no dict is replaced as a whole.

    Args:
        document: Any value that JSON can hold; it is left as it is.
        count: How many copies to yield.
        seed: The seed of the generator: the same seed gives the same edits.
    """
    generator = random.Random(seed)
    places = list(_places(document))
    for _ in range(count):
        edited = copy.deepcopy(document)
        path = generator.choice(places) if places else ()
        yield _edit(edited, path, generator)


def byte_edits(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies of a file's content, with a description of each damage.

    A damage flips a bit, overwrites a run of bytes, cuts the end off, doubles a part, or removes one.

    Args:
        data: The content, at least one byte.
        count: How many copies to yield.
        seed: The seed of the generator: the same seed gives the same damages.
    """
    generator = random.Random(seed)
    for _ in range(count):
        place = generator.randrange(len(data))
        length = generator.randint(1, 64)
        kind = generator.choice(["flip a bit", "overwrite", "cut off", "double", "remove"])
        if kind == "flip a bit":
            damaged = bytearray(data)
            damaged[place] ^= 1 << generator.randrange(8)
            yield f"flip a bit of byte {place}", bytes(damaged)
        elif kind == "overwrite":
            damaged = bytearray(data)
            damaged[place : place + length] = generator.randbytes(len(damaged[place : place + length]))
            yield f"overwrite {length} bytes from {place}", bytes(damaged)
        elif kind == "cut off":
            yield f"cut off at byte {place}", data[:place]
        elif kind == "double":
            yield f"double {length} bytes from {place}", data[: place + length] + data[place:]
        else:
            yield f"remove {length} bytes from {place}", data[:place] + data[place + length :]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of a document."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def _edit(document: Any, path: tuple[Any, ...], generator: random.Random) -> tuple[str, Any]:
    if not path:
        strange = generator.choice(STRANGE)
        return f"replace all by {strange!r:.60}", strange
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    where = "/".join(map(str, path))
    kind = generator.choice(["remove", "replace", "replace", "replace", "wrap", "double", "rename", "add", "nest"])
    if kind == "remove":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [value]
    elif kind == "double" and isinstance(value, (list, str)):
        parent[key] = value + value
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif kind == "add" and isinstance(value, dict):
        value["unknown_key"] = generator.choice(STRANGE)
    elif kind == "nest":
        nested: Any = []
        for _ in range(300):
            nested = [nested]
        parent[key] = nested
    else:
        parent[key] = generator.choice(STRANGE)
        return f"replace {where} by {parent[key]!r:.60}", document
    return f"{kind} {where}", document
