"""What a checkpoint must look like before anything of it is used: one check, one error that names the place.

Values that only a trainer can judge are compared in `lit_adapters.lightning.resume.state_forms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_adapters.errors import AdapterError, shown

RECORD, RECORD_FORMAT = "lit_adapters", 1  # name and format of our entry in Lightning's checkpoints
_LARGEST = 2**62
_LOOPS = {"fit_loop", "validate_loop", "test_loop", "predict_loop"}  # Lightning writes and reads all
_LARGE_VIEW = 1 << 24  # elements: modules may have small buffers that are views
_DEEPEST = 300  # levels of nested values
_VERSION = re.compile(r"\d+(\.\w+){1,5}([+-][\w.]+)?")


def check_checkpoint(checkpoint: Any, path: str | Path) -> None:
    """Check the entries of a checkpoint that Lightning and this library read; others may be anything.

    Args:
        checkpoint: As it was read, with weights_only.
        path: The file, for messages.

    Raises:
        AdapterError: An entry has another form than a run writes, or a tensor is larger than its values in the file;
            the message names it. Or the record has a newer format.
    """
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise AdapterError(f"{str(path)!r} is not a Lightning checkpoint: it has no state_dict")
    for key, (fits, what) in _ENTRIES.items():
        if key in checkpoint and not fits(checkpoint[key]):
            _refuse(path, key, checkpoint[key], what)
    _check_sizes(checkpoint, "", path)
    record = checkpoint.get(RECORD)
    if RECORD not in checkpoint or record == {}:
        return
    if not isinstance(record, Mapping):
        _refuse(path, RECORD, record, "values by name")
    _check_record(record, path)


def _check_record(record: Mapping[str, Any], path: str | Path) -> None:
    form: Any = record.get("format")
    if not is_count(form):
        _refuse(path, f"{RECORD}/format", form, "a whole number")
    if form > RECORD_FORMAT:
        raise AdapterError(
            f"{str(path)!r} has format {shown(form)}, written by lit-adapters {shown(record.get('version'))}; this "
            f"version reads up to {RECORD_FORMAT}: update lit-adapters"
        )
    for key, (fits, what) in _RECORD.items():
        if not fits(record.get(key)):
            _refuse(path, f"{RECORD}/{key}", record.get(key), what)
    for name, model in record["models"].items():
        for key, (fits, what) in _MODEL.items():
            if not fits(model.get(key)):
                _refuse(path, f"{RECORD}/models/{name}/{key}", model.get(key), what)
    for key, (fits, what) in _RESUMING.items():
        if key in record and not fits(record[key]):
            _refuse(path, f"{RECORD}/{key}", record[key], what)
    if "processes" in record and not _all(record["processes"], _is_process):
        _refuse(path, f"{RECORD}/processes", record["processes"], _OF_A_PROCESS)


def _refuse(path: str | Path, key: str, value: Any, what: str) -> NoReturn:
    raise AdapterError(
        f"{str(path)!r}: {shown(key)} in the checkpoint is {shown(value)}, and must be {what}; take an undamaged one"
    )


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def is_named(value: Any, inner: Callable[[Any], bool] = lambda value: True) -> bool:
    """Whether a value is a mapping from text to values for which `inner` holds."""
    return isinstance(value, Mapping) and all(map(is_text, value.keys())) and all(map(inner, value.values()))


def _all(value: Any, inner: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(inner, value))


def _holds_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not value.is_nested


def _is_state(value: Any) -> bool:
    return is_named(value) and all(
        _holds_values(entry) for key, entry in value.items() if not key.endswith("_extra_state")
    )


def _check_sizes(value: Any, place: str, path: str | Path, depth: int = _DEEPEST) -> None:
    """Refuse tensors that are views of a few values, and would fill the memory where they are copied.

    Raises:
        AdapterError: A tensor is large, and larger than the values that the file holds for it; or values are nested
            too deeply.
    """
    if depth == 0:
        _refuse(path, place, value, f"nested at most {_DEEPEST} deep")
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout is not torch.strided or value.numel() <= _LARGE_VIEW:
            return
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            _refuse(path, place, f"{tuple(value.shape)} {value.dtype}", "a tensor whose values are all in the file")
    elif isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(inner, (Tensor, Mapping, list, tuple)):
                _check_sizes(inner, f"{place}/{key}" if place else str(key), path, depth - 1)


def _is_loop(value: Any) -> bool:
    return is_named(value) and all(
        _is_progress(inner) for key, inner in value.items() if key.endswith("batch_progress")
    )


def _is_progress(value: Any) -> bool:
    return is_named(value) and all(is_named(value.get(name), is_count) for name in ("total", "current"))


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    listed = _all(groups, lambda group: is_named(group) and _all(group.get("params"), _is_parameter))
    entries = value["state"].values()
    return listed and all(map(_is_parameter, value["state"])) and all(is_named(entry) for entry in entries)


def _is_parameter(value: Any) -> bool:
    """Whether a value stands for a parameter: its number, or its name where a strategy shards the optimiser."""
    return is_count(value) or is_text(value)


def _is_method(value: Any) -> bool:
    return is_named(value) and is_text(value.get("class_path")) and isinstance(value.get("init_args", {}), Mapping)


def _is_random(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("torch"), Tensor):
        return False
    numpy, python = value.get("numpy"), value.get("python")
    return (
        isinstance(numpy, Mapping)
        and isinstance(numpy.get("key"), Tensor)
        and numpy["key"].shape == (624,)
        and is_count(numpy.get("pos"))
        and numpy.get("has_gauss") in (0, 1)
        and isinstance(numpy.get("gauss"), float)
        and isinstance(python, Mapping)
        and python.get("version") == 3
        and isinstance(python.get("state"), Tensor)
        and python["state"].shape == (625,)
        and isinstance(python.get("gauss"), (float, type(None)))
        and value["torch"].dtype.itemsize == 1
    )


def _is_pending(value: Any) -> bool:
    return is_named(value) and is_count(value.get("step")) and is_named(value.get("values"), is_number)


def _is_process(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and (value.get("random", ...) is None or _is_random(value.get("random")))
        and is_named(value.get("gradients"), _holds_values)
        and is_named(value.get("metrics", {}), lambda metric: _holds_values(metric) and metric.numel() == 1)
        and _all(value.get("loaders", []), lambda loader: loader is None or is_named(loader))
    )


_Checks = dict[str, tuple[Callable[[Any], bool], str]]
_ENTRIES: _Checks = {
    "state_dict": (_is_state, "tensors by name"),
    "epoch": (is_count, "a whole number"),
    "global_step": (is_count, "a whole number"),
    "pytorch-lightning_version": (lambda v: is_text(v) and _VERSION.fullmatch(v) is not None, "a version"),
    "loops": (
        lambda value: is_named(value, _is_loop) and value.keys() >= _LOOPS,
        f"the states of {', '.join(sorted(_LOOPS))}",
    ),
    "callbacks": (is_named, "the states of the callbacks by name"),
    "optimizer_states": (lambda value: _all(value, _is_optimizer), "a list of states of optimisers"),
    "lr_schedulers": (lambda value: _all(value, is_named), "a list of states of schedules"),
    "hyper_parameters": (is_named, "values by name"),
    "learned_tokens": (is_count, "a whole number"),
    "rollouts": (
        lambda value: _all(value, lambda own: is_named(own, lambda tensor: isinstance(tensor, Tensor))),
        "a list of tensors by name",
    ),
}
_RECORD: _Checks = {
    "version": (is_text, "text"),
    "module": (is_text, "the class path of a LightningModule"),
    "models": (lambda value: is_named(value, is_named), "descriptions of models by name"),
}
_OF_A_PROCESS = "the random states, gradients, logged values and states of loaders of each process"
_RESUMING: _Checks = {
    "pending": (_is_pending, "a step and numbers by name"),
    "rates_due": (lambda value: isinstance(value, bool), "true or false"),
    "rates_done": (lambda value: isinstance(value, bool), "true or false"),
}
_MODEL: _Checks = {
    "methods": (lambda value: _all(value, _is_method), "a list of forms with class_path and init_args"),
    "train": (lambda value: is_text(value) or _all(value, is_text), "text or a list of names"),
    "adapters": (lambda value: is_named(value, is_text), "the name of a method by layer"),
    "trained": (lambda value: _all(value, is_text), "a list of names"),
}
