"""Copies of frozen parameters that anything puts into a checkpoint, such as an average of weights beside the model.

A copy that equals the model's own parameter bit for bit is left out, with a note of its place, and put back when the
checkpoint is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.training.attached import attached_models
from lit_adapters.training.checkpoint import redundant_keys

LEFT_OUT = "lit_adapters_left_out"  # the entry of a checkpoint with the places
_SMALL = 1024  # bytes of a tensor that is not worth a note


def leave_out_copies(checkpoint: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The checkpoint without copies of frozen parameters, and with an entry that says where they belong.

    Args:
        checkpoint: As Lightning and callbacks made it; it is not changed.
        module: The one that trains.
    """
    state = module.state_dict()
    frozen = {key: state[key] for key in redundant_keys(module) if key in state}
    own = {key: key for key in frozen}
    for name in attached_models(module):  # a callback may hold the adapted model by itself
        own |= {key.removeprefix(f"{name}."): key for key in frozen if key.startswith(f"{name}.")}
    places: list[dict[str, Any]] = []

    def without(value: Any, path: list[Any]) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            found = {k: own_key for k, v in value.items() if (own_key := _same(k, v, own, frozen)) is not None}
            kept = {k: without(v, [*path, k]) for k, v in value.items() if k not in found}
            if found:
                places.append({"path": path, "keys": keys, "of": found})
            if not found and all(kept[k] is value[k] for k in keys):
                return value
            changed = copy.copy(value)  # of its own class
            changed.clear()
            changed.update(kept)
            return changed
        if type(value) in (list, tuple):
            items = [without(v, [*path, i]) for i, v in enumerate(value)]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        return value

    skipped = ("optimizer_states", "loops", "lr_schedulers")
    result = {key: value if key in skipped else without(value, [key]) for key, value in checkpoint.items()}
    return result | ({LEFT_OUT: places} if places else {})


def _same(key: Any, value: Any, own: Mapping[str, str], frozen: Mapping[str, Tensor]) -> str | None:
    """The state dict key of the frozen parameter that a checkpoint's tensor is a copy of; None if there is none."""
    if not isinstance(key, str) or not isinstance(value, Tensor) or value.nbytes < _SMALL:
        return None
    while key not in own:
        key = key.partition(".")[2]
        if not key:
            return None
    mine = frozen[own[key]]
    if type(value) is not type(mine) or value.shape != mine.shape or value.dtype != mine.dtype:
        return None
    return own[key] if torch.equal(value.to(mine.device), mine) else None


def put_copies_back(checkpoint: dict[str, Any], module: nn.Module, path: Any) -> None:
    """Put into a checkpoint what `leave_out_copies` left out, with the values of the model.

    Args:
        checkpoint: As it was read; changed in place.
        module: The one that goes on from it.
        path: Where the checkpoint was read, for the message.

    Raises:
        AdapterError: The checkpoint lacks a place that the entry names, or the model lacks a parameter.
    """
    places = checkpoint.pop(LEFT_OUT, None)
    if places is None:
        return
    state = module.state_dict()
    frozen = {key: state[key] for key in redundant_keys(module) if key in state}
    try:
        for place in places:
            holder: Any = checkpoint
            for step in place["path"]:
                holder = holder[step]
            copies = {key: frozen[name].detach().clone() for key, name in place["of"].items()}
            whole = {key: copies[key] if key in copies else holder[key] for key in place["keys"]}
            if not isinstance(holder, dict) or whole.keys() != {*holder, *copies}:
                raise KeyError("keys")
            holder.clear()
            holder.update(whole)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"the entry {LEFT_OUT!r} of {str(path)!r} does not fit the checkpoint or the model ({error}); the file is "
            "damaged, or the model another one: give another checkpoint"
        ) from error
