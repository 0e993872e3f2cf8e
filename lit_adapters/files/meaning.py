"""What a model's inputs and outputs mean: names of classes, image size, end token, chat template, and the like.

An application sets the meaning on its model as a plain JSON object. It then travels with the weights: in the header of
adapter directories, in checkpoints, and in `meaning.json` beside merged weights. Two different values of one key are an
error where the files are used, except that a meaning which came with a base's weights gives way to that of an adapter
or a checkpoint trained on them. The keys belong to the application; this library only carries them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.atomic import write_text_atomically

MEANING_FILE = "meaning.json"  # beside merged weights
HEADER_KEY = "meaning"  # in the header of an adapter directory
CHECKPOINT_KEY = "lit_adapters_meaning"  # in a checkpoint: the meaning of each model, by qualified name
MAX_BYTES = 1 << 21  # 20,000 names of classes take 500 kB
_ATTRIBUTE = "_lit_adapters_meaning"
_OF_THE_BASE = "_lit_adapters_meaning_of_the_base"


def set_meaning(model: nn.Module, meaning: Mapping[str, Any], of_the_base: bool = False) -> None:
    """Say what the inputs and outputs of `model` mean, in place of what was said before.

    Args:
        model: The module given to `attach`.
        meaning: Values that JSON can hold, by name, such as `{"classes": ["cat", "dog"], "image_size": 224}`.
        of_the_base: Whether it came with the pretrained weights. The meaning of a checkpoint or an adapter directory
            then takes its place, as the training may have been on other data.

    Raises:
        AdapterError: The meaning is no JSON object, or larger than 2 MiB.
    """
    model.__dict__[_ATTRIBUTE] = checked(meaning, "set_meaning")
    model.__dict__[_OF_THE_BASE] = of_the_base


def meaning_of(model: nn.Module) -> dict[str, Any]:
    """A copy of what was said of `model`; empty if nothing was."""
    return json.loads(json.dumps(model.__dict__.get(_ATTRIBUTE, {})))


def is_of_the_base(model: nn.Module) -> bool:
    """Whether the meaning of `model` came with its pretrained weights."""
    return bool(model.__dict__.get(_OF_THE_BASE, False))


def binding_meaning(model: nn.Module) -> dict[str, Any]:
    """A copy of what a file for `model` must agree with: its meaning, unless that came with the pretrained weights."""
    return {} if is_of_the_base(model) else meaning_of(model)


def adopt_meaning(model: nn.Module, saved: Any, origin: str) -> None:
    """Give `model` the meaning that a file holds. It is added to the model's own, or replaces that of its base.

    Args:
        model: The module that the file's weights are for.
        saved: The meaning as it was read.
        origin: The file, for messages.

    Raises:
        AdapterError: The saved meaning is no JSON object, or the model has another value of one of its keys.
    """
    saved, present = checked(saved, origin), binding_meaning(model)
    check_same(saved, present, origin)
    if saved:
        set_meaning(model, present | saved)


def check_same(saved: Mapping[str, Any], present: Mapping[str, Any], origin: str) -> None:
    """Compare the meaning that a file holds with the one that is asked for.

    Args:
        saved: The meaning of the file, as `checked` returns it.
        present: The meaning that is asked for; keys that only one of them has are no contradiction.
        origin: The file, for messages.

    Raises:
        AdapterError: A key has two values; the message names both.
    """
    present = checked(present, "the model")
    for key in saved.keys() & present.keys():
        if saved[key] != present[key]:
            raise AdapterError(
                f"{origin} was trained with {key} {shown(saved[key])}, but {shown(present[key])} is asked for: "
                f"use the first, or leave {key} out to take it from the file"
            )


def checked(meaning: Any, origin: str) -> dict[str, Any]:
    """A copy of `meaning` as JSON gives it back: lists in place of tuples.

    Args:
        meaning: What was given or read.
        origin: Where it came from, for messages.

    Raises:
        AdapterError: It is no object of plain JSON values, or larger than 2 MiB.
    """
    try:
        if not isinstance(meaning, Mapping) or not all(isinstance(key, str) for key in meaning):
            raise TypeError(f"{shown(meaning)} is no object with names as keys")
        text = json.dumps(dict(meaning), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"{origin}: the meaning must hold plain JSON values only: {error}") from error
    if len(text) > MAX_BYTES:
        raise AdapterError(f"{origin}: the meaning takes {len(text):,} bytes as JSON, the limit is {MAX_BYTES:,}")
    return json.loads(text)


def save_meanings(checkpoint: MutableMapping[str, Any], module: nn.Module) -> None:
    """Put the meaning of `module` and of each module inside it into a checkpoint, where one was set."""
    meanings = {name: meaning_of(model) for name, model in module.named_modules() if _ATTRIBUTE in model.__dict__}
    if meanings:
        checkpoint[CHECKPOINT_KEY] = meanings


def saved_meanings(checkpoint: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """The meanings that a checkpoint holds, by qualified name of the model.

    Args:
        checkpoint: As it was read.
        origin: The file, for messages.

    Raises:
        AdapterError: The entry of the checkpoint is malformed.
    """
    saved = checkpoint.get(CHECKPOINT_KEY, {})
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise AdapterError(f"{origin}: {CHECKPOINT_KEY} is {shown(saved)}, not an object of meanings by name of model")
    return {name: checked(meaning, origin) for name, meaning in saved.items()}


def restore_meanings(checkpoint: Mapping[str, Any], module: nn.Module, origin: str = "the checkpoint") -> None:
    """Add the meanings that a checkpoint holds to those of the modules of `module`.

    Args:
        checkpoint: As it was read.
        module: The LightningModule that was given to `save_meanings`, with its models built.
        origin: Where the checkpoint was read, for messages.

    Raises:
        AdapterError: An entry is malformed, belongs to no module, or contradicts what was set.
    """
    for name, meaning in saved_meanings(checkpoint, origin).items():
        try:
            model = module.get_submodule(name)
        except AttributeError as error:
            raise AdapterError(f"{origin} gives the meaning of {shown(name)}, which the module has not") from error
        adopt_meaning(model, meaning, origin)


def write_meaning(model: nn.Module, directory: Path) -> None:
    """Write `meaning.json` into a directory of merged weights, if a meaning was set."""
    if meaning := meaning_of(model):
        write_text_atomically(directory / MEANING_FILE, json.dumps(meaning, indent=1) + "\n")


def read_meaning(directory: Path) -> dict[str, Any]:
    """The meaning that lies beside merged weights; empty where there is no `meaning.json`.

    Raises:
        AdapterError: The file is no JSON object, or larger than 2 MiB.
    """
    path = directory / MEANING_FILE
    try:
        if not path.is_file():
            return {}
    except OSError:  # a name that no file can have
        return {}
    if path.stat().st_size > 2 * MAX_BYTES:  # indented, so somewhat larger than what `checked` counts
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes, too many for a meaning: remove it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}; write the directory again") from error
    return checked(found, str(path))
