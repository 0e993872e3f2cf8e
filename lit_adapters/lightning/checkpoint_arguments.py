"""The model's arguments on a command line with a checkpoint: what the user typed, and the checkpoint's for the rest.

Lightning's own way lets the checkpoint win over the recipe and the command line, so that a file could choose reward
functions. Here what was typed wins. Where it cannot go with the checkpoint's weights, it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.checkpoint_schema import RECORD
from lit_adapters.lightning.loading import LoadsFromFiles
from lit_adapters.methods.method import to_methods
from lit_adapters.training.checkpoint import check_settings
from lit_adapters.training.hyperparameters import (
    arguments_from,
    built,
    check_plain,
    check_trust,
    constructor_types,
    read_hyperparameters,
)

_UNKNOWN_YET = "init_seed"  # if it is null, the run draws a value, which nobody knows before


def arguments_of_checkpoint(
    cls: type, checkpoint: Mapping[str, Any], path: Path, typed: Mapping[str, Any], present: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that the checkpoint has and the user left open, after a comparison of the others.

    Args:
        cls: The class of the model.
        checkpoint: As it was read, with weights_only.
        path: The file, for messages.
        typed: The model's arguments that the recipe or the command line gives, without defaults.
        present: The same with defaults, in plain values.

    Raises:
        AdapterError: A value of the checkpoint is refused, see `arguments_from`; or a typed one cannot go with its
            weights.
    """
    check_trust(typed)
    written, hints = read_hyperparameters(checkpoint, path), constructor_types(cls)
    given = {name for name in typed if not (name == _UNKNOWN_YET and typed[name] is None)}
    unknown = sorted(written.keys() - hints.keys())
    if unknown:
        raise AdapterError(
            f"{str(path)!r} has the hyperparameter {shown(unknown[0])}, which {cls.__name__} does not take; give a "
            "checkpoint of this command's own `fit`"
        )
    others = {name: written[name] for name in sorted(given & written.keys())}
    recorded = {"adapters"} if RECORD in checkpoint else set()  # compared by the record
    check_fixed(cls, {name: value for name, value in others.items() if name not in recorded}, present, path)
    fixed = _fixed(cls)
    replaced = [name for name in others if name not in fixed and not _same(others[name], present[name])]
    if replaced:
        values = ", ".join(f"{name} {shown(present[name])} (there {shown(others[name])})" for name in replaced)
        rank_zero_info(f"given here, in place of the values in {path}: {values}")
    if issubclass(cls, LoadsFromFiles):
        return cls.from_file(dict(checkpoint), path, given)
    found = arguments_from(cls, checkpoint, path, given)
    for name, value in found.items():
        if hints[name] is Any:
            _check_texts(name, value, path)
    return found


def check_fixed(cls: type, written: Mapping[str, Any], present: Mapping[str, Any], path: str | Path) -> None:
    """Refuse arguments that cannot go with the weights of a checkpoint.

    A path in place of a name, or of a path that is gone, may be the same model elsewhere: it is used, with a warning.

    Args:
        cls: The class of the model; what is fixed is in `LoadsFromFiles.fixed_by_weights`.
        written: The arguments of the checkpoint.
        present: Those of the run.
        path: The file, for messages.

    Raises:
        AdapterError: An argument differs; the message names both values.
    """
    for name in sorted(_fixed(cls) & written.keys() & present.keys()):
        theirs, mine = written[name], present[name]
        if name == "adapters":
            check_plain(name, theirs, path)
            theirs, mine = ([method.to_config() for method in to_methods(built(side))] for side in (theirs, mine))
            check_settings(theirs, mine, path)
        elif not _same(theirs, mine):
            if not _moved(theirs, mine):
                raise AdapterError(
                    f"{str(path)!r} was trained with {name} {shown(theirs)}, and {shown(mine)} is given: leave {name} "
                    "out, or give the checkpoint's"
                )
            rank_zero_warn(
                f"{path} was trained with {name} {shown(theirs)}; {shown(mine)} is used in its place, as it was given"
            )


def check_base(module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that was trained on another base than that of a module of ours.

    Methods and modules of `train` are compared by the record, and seeds are not compared, as they are often drawn.

    Raises:
        AdapterError: An argument that the weights belong to differs.
    """
    if isinstance(module, LoadsFromFiles):
        skipped = {"adapters", "train", _UNKNOWN_YET}
        written = {k: v for k, v in read_hyperparameters(checkpoint, path).items() if k not in skipped}
        check_fixed(type(module), written, dict(module.hparams), path)


def _fixed(cls: type) -> frozenset[str]:
    found: frozenset[str] = getattr(cls, "fixed_by_weights", LoadsFromFiles.fixed_by_weights)
    return found


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, str) and isinstance(second, str) and Path(first).exists() and Path(second).exists():
        return Path(first).samefile(second)
    one, other = (json.loads(json.dumps(side, default=repr)) for side in (first, second))
    return bool(one == other)


def _moved(written: Any, present: Any) -> bool:
    """Whether an existing path stands in place of a name, or of a path that exists no longer."""
    return (
        isinstance(present, str) and Path(present).exists() and isinstance(written, str) and not Path(written).exists()
    )


def _check_texts(name: str, value: Any, path: Path) -> None:
    """Refuse text that the parser would read as YAML, where the type of an argument is not known.

    Raises:
        AdapterError: A text means something else in YAML than a number or itself.
    """
    if isinstance(value, (list, tuple)):
        for inner in value:
            _check_texts(name, inner, path)
    if not isinstance(value, str):
        return
    try:
        meant = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    if isinstance(meant, (dict, list)) or (isinstance(meant, str) and meant != value):
        raise AdapterError(
            f"{str(path)!r}: the checkpoint's hyperparameter {name} is the text {shown(value)}, which the command line "
            "would read as more than text: give its value yourself"
        )
