"""Tells whether the frozen weights of a base model are those that adapters were trained on.

Every element counts: the sums of rows and columns of a tensor's bits take one pass at the speed of memory, where a
cryptographic hash of all bytes would take several times as long. Only the sums are hashed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_adapters.methods.quantised import plain_values
from lit_adapters.model.sharding import whole

WORD = re.compile(r"-|h?[0-9a-f]{10}:(\d\.\d{3}e[+-]\d\d|nan|inf)")
_UNKNOWN = "-"  # a weight that holds no values yet
_HALF = "h"  # marks a weight that was stored in float16
_CHUNK = 1 << 24  # elements that are rounded at a time
_WIDTH = 1024  # columns of the matrix of 8-byte words whose rows and columns are summed
_SAMPLES = 4096  # elements that the norm is taken of
_SAME_NORM = 2e-3  # relative: what rounding to another dtype changes at most
_OLD_SAMPLES = 16


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A text for the header of an adapter directory: one word for each weight, in the order of their names.

    Floating values are rounded to bfloat16 first, so that it does not matter whether they are stored in bfloat16 or in
    float32. Rounding float16 to bfloat16 gives other values; a weight in float16 is compared with one in another dtype
    by its norm alone.

    Args:
        weights: The frozen weights by name.
    """
    return " ".join(_word(weights[name].detach()) for name in sorted(weights))


def differing(saved: str, weights: Mapping[str, Tensor]) -> list[str]:
    """The names of weights that differ from those of the saved fingerprint.

    Args:
        saved: What `fingerprint` returned for weights of the same names.
        weights: The present frozen weights by name.
    """
    words, names = saved.split(), sorted(weights)
    if len(words) != len(names):
        return names
    present = fingerprint(weights).split()
    return [name for name, old, new in zip(names, words, present, strict=True) if not _same(old, new)]


def _same(old: str, new: str) -> bool:
    if old == new or _UNKNOWN in (old, new):
        return True
    if old.startswith(_HALF) == new.startswith(_HALF):
        return old.split(":")[0] == new.split(":")[0]
    norms = [float(word.split(":")[1]) for word in (old, new)]
    return abs(norms[0] - norms[1]) <= _SAME_NORM * max(norms)


@torch.no_grad()
def _word(weight: Tensor) -> str:
    weight = plain_values(whole(weight))
    if weight.is_meta:
        return _UNKNOWN
    digest = hashlib.sha256()
    values = weight.reshape(-1)
    for start in range(0, max(1, values.numel()), _CHUNK):
        part = values[start : start + _CHUNK]
        _add(digest, part.to(torch.bfloat16) if part.is_floating_point() else part)
    scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
    if isinstance(scales, Tensor):  # of a weight in 4 bit; its elements are codes
        _add(digest, scales.reshape(-1).to(torch.bfloat16) if scales.is_floating_point() else scales.reshape(-1))
    sample = values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES]
    norm = 0.0 if sample.is_complex() else sample.float().norm().item()
    return f"{_HALF if weight.dtype == torch.float16 else ''}{digest.hexdigest()[:10]}:{norm:.3e}"


def _add(digest: hashlib._Hash, values: Tensor) -> None:
    """Let all bits of a vector (N,) count in the digest."""
    if values.device.type not in ("cpu", "cuda"):  # others may lack sums of 64-bit integers
        values = values.cpu()
    values = values.contiguous()
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()
    count = values.numel() * values.element_size() // (8 * _WIDTH) * (8 * _WIDTH // values.element_size())
    if count:
        words = values[:count].view(torch.int64).view(-1, _WIDTH)
        digest.update(words.sum(0).cpu().numpy().tobytes() + words.sum(1).cpu().numpy().tobytes())
    digest.update(values[count:].view(torch.uint8).cpu().numpy().tobytes())


def old_fingerprint(weights: Mapping[str, Tensor]) -> str | None:
    """The fingerprint that earlier versions wrote and read: a hash of a few values of every weight.

    Returns:
        The hash; None if a weight has no values yet.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if weight.is_meta:
            return None
        flat = plain_values(whole(weight.detach())).reshape(-1)
        sample = flat[:: max(1, flat.numel() // _OLD_SAMPLES)][:_OLD_SAMPLES].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
