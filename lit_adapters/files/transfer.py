"""Adapters for a model that is not quite the one they were trained on: names with other prefixes, and other shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.targets import matches, places
from lit_adapters.model.record import adapters

_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # what torch.compile puts before names
_PARALLEL = "module."  # what DistributedDataParallel puts there


def named_as_in(
    header: dict[str, Any], tensors: dict[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the prefixes of torch.compile and DistributedDataParallel out of the names in a file.

    A model may have a part that is called `module`: nothing is changed if its names are those of the file.

    Args:
        header: Of an adapter directory.
        tensors: Of an adapter directory.
        names: Those of the model's parameters.
    """
    saved = header["base"]["shapes"]
    if any(name in names for name in saved) or not any(_plain(name) in names for name in saved):
        return header, tensors
    settings = [m.get("init_args", {}) for m in header["methods"]]
    methods = [
        {**m, "init_args": {k: _in_lists(v) for k, v in given.items()}}
        for m, given in zip(header["methods"], settings, strict=True)
    ]
    renamed = {
        **header,
        "adapters": {_plain(n): kind for n, kind in header["adapters"].items()},
        "train": _in_lists(header["train"]),
        "methods": methods,
        "base": {**header["base"], "shapes": {_plain(n): shape for n, shape in saved.items()}},
    }
    if "unfrozen" in header:
        renamed["unfrozen"] = {_plain(n): trains for n, trains in header["unfrozen"].items()}
    return renamed, {_plain(n): t for n, t in tensors.items()}


def _plain(name: str) -> str:
    return _COMPILED.sub("", name.removeprefix(_PARALLEL)).removeprefix(_PARALLEL)


def _in_lists(value: Any) -> Any:
    """A setting with plain names: a list of names, or `rank_pattern`, whose keys are patterns for names."""
    if isinstance(value, dict):
        return {_plain_pattern(key): inner for key, inner in value.items()}
    return [_plain(v) if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


def _plain_pattern(pattern: str) -> str:
    """The pattern of a name that `re.escape` wrote, without prefixes; others as they are."""
    name = pattern.replace("\\.", ".")
    return re.escape(_plain(name)) if re.escape(name) == pattern else pattern


def matching_train(model: nn.Module, train: str | list[str]) -> str | list[str]:
    """What of `train` names parameters of this model, as its head may be called otherwise."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def known(spec: str | list[str]) -> bool:
        modules = [t.name for t in places(model) if matches(t.name, spec)]
        return any(matches(n, spec) or any(n.startswith(f"{m}.") for m in modules) for n in parameters)

    if isinstance(train, str):
        return train if train and known(train) else ""
    return [suffix for suffix in train if known([suffix])]


def what_fits(
    model: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file that fit a model, and the names of all that were left out.

    An adapter is taken as a whole, or left at its start.

    Args:
        model: With its adapters, at their start.
        header: Of the file.
        tensors: Of the file.
        expected: What a file of this model would hold.

    Raises:
        AdapterError: No adapter fits.
    """

    def fits(name: str) -> bool:
        found = tensors.get(name)
        return (
            found is not None
            and found.shape == expected[name].shape
            and found.is_floating_point() == expected[name].is_floating_point()
        )

    chosen = {name for name in expected if fits(name)}
    found = list(adapters(model))
    left_out = []
    for name, adapter in found:
        own = {f"{name}.{key}" for key in adapter.adapter_tensors()}
        if not own <= chosen or header["adapters"].get(name) != adapter.method:
            chosen -= own
            left_out.append(name)
    if found and len(left_out) == len(found):
        raise AdapterError(
            f"none of the {len(found)} adapters fits this model, {left_out[0]!r} first: it has other layers"
        )
    names = sorted((tensors.keys() | expected.keys()) - chosen)
    return {name: tensors[name] for name in chosen}, names


def warn_left_out(names: Collection[str], what: str) -> None:
    """Say which tensors of a file were not loaded, or which of a model kept their start."""
    if names:
        shown = ", ".join(map(repr, list(names)[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{what} does not fit everywhere: {shown} stay as they are in the model (`left_out` of the report)",
            stacklevel=3,
        )
