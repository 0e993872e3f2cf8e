"""The header of an adapter directory: what it must hold, and the checksums that tie it to the tensors.

A file may come from elsewhere. So nothing of the header is used before all of it has been checked here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.base_name import is_repository, is_revision, is_task
from lit_adapters.files.fingerprint import WORD

FORMAT = 1
_KEYS = ("format", "lit_adapters", "methods", "train", "adapters", "base")
_SUMS = "checksums"  # absent in files of earlier versions, as are base/fingerprint and unfrozen
_DEEPEST = 64  # levels of lists and objects in each other
_LONGEST_NAME = 1000
_MOST_ELEMENTS = 1 << 48  # of a parameter
_SHAPE = re.compile(r"(\d{1,12}(x\d{1,12}){0,7})?")
# Others, such as float8, have no functions to check their values with.
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool}
_DTYPES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def header_text(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The header as it is written, with checksums of the tensors and of itself.

    Args:
        header: All values but the checksums.
        tensors: The tensors of the file by name, on the CPU.

    Raises:
        AdapterError: A value of the header could not be read again.
    """
    plain = json.loads(json.dumps(header))
    plain[_SUMS] = {"header": "", "tensors": tensors_checksum(tensors)}
    plain[_SUMS]["header"] = _header_checksum(plain)
    text = json.dumps(plain, indent=1)
    parse_header(text, "the header to be written")
    return text


def parse_header(text: str, origin: Path | str) -> dict[str, Any]:
    """Read a header and check every value that the library uses.

    Args:
        text: As the tensor file holds it.
        origin: The file, for messages.

    Raises:
        AdapterError: It is no JSON object of ours, of a newer format, lacks a key, or a value is of another kind than
            `save_adapters` writes; or it has a checksum and was changed after it was written.
    """
    header = _read_json(text, origin)
    if not isinstance(header, dict) or "format" not in header or not isinstance(header.get("lit_adapters"), str):
        raise AdapterError(f"{origin} was not written by lit_adapters: its header is unreadable")
    form = header["format"]
    if form != FORMAT or not isinstance(form, int) or isinstance(form, bool):
        raise AdapterError(
            f"{origin} has format {shown(form)}, this version reads {FORMAT}; it was written by lit_adapters "
            f"{shown(header['lit_adapters'])}, install that version or a later one"
        )
    check = _Check(header, origin)
    check.keys("", header, _KEYS)
    check.value("methods", _is_methods, "a list of objects with class_path and init_args")
    check.value("train", _is_names_or_pattern, "a list of names or one text")
    check.value("adapters", _is_kinds, "an object with the name of a method for each layer")
    check.value("base", lambda base: isinstance(base, dict), "an object")
    check.keys("base/", header["base"], ("shapes", "weights"))
    check.value("base/shapes", _is_shapes, 'an object of shapes such as "64x32" by the name of a parameter')
    check.value("base/weights", lambda value: value is None or _is_hash(value), "null or 64 hexadecimal digits")
    if "fingerprint" in header["base"]:
        check.keys("", header, (_SUMS,))  # written together: damage to the name of one must not hide the other
        check.value("base/fingerprint", _is_fingerprint, "one word for each weight")
    for key, fits, what in (
        ("name", is_repository, "the name of a repository"),
        ("revision", is_revision, "the name of a revision"),
        ("task", is_task, "a task of peft"),
    ):
        if key in header["base"]:
            check.value(f"base/{key}", fits, what)
    if "unfrozen" in header:
        check.value("unfrozen", lambda value: _is_unfrozen(value, header), "true or false by the name of a parameter")
    if _SUMS in header:
        check.value(_SUMS, _is_sums, "an object with two sums of 64 hexadecimal digits")
        if header[_SUMS]["header"] != _header_checksum(header):
            raise AdapterError(f"{origin}: its header was changed after it was written; take an unchanged copy")
    return header


def check_text(text: str, header: Mapping[str, Any], origin: Path | str) -> None:
    """Check that the text of a header with checksums is the very one that was written.

    Args:
        text: As the tensor file holds it.
        header: What `parse_header` returned for it.
        origin: The file, for messages.

    Raises:
        AdapterError: It was changed, even if it says the same.
    """
    if _SUMS in header and text != json.dumps(header, indent=1):
        raise AdapterError(f"{origin}: its header was changed after it was written; take an unchanged copy")


def check_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: Path | str) -> None:
    """Check tensors against the header of their file.

    Args:
        header: What `parse_header` returned.
        tensors: All tensors of the file by name.
        origin: The file, for messages.

    Raises:
        AdapterError: A value is not finite or of a type that no adapter has, the shape of a base parameter is not the
            one in the header, or the tensors were changed after they were written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"{origin}: {shown(name)} is {tensor.dtype}, as no adapter is; take an undamaged copy")
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
            raise AdapterError(f"{origin}: {shown(name)} holds values that are not finite; take an undamaged copy")
        recorded = header["base"]["shapes"].get(name)
        if recorded is not None and recorded != "x".join(map(str, tensor.shape)):
            raise AdapterError(f"{origin}: {name!r} has shape {tuple(tensor.shape)}, and {recorded} in the header")
    missing = [name for name in header.get("unfrozen", {}) if name not in tensors]
    if missing:
        raise AdapterError(f"{origin} lacks {shown(missing[0])}, which its header lists; take an undamaged copy")
    if _SUMS in header and header[_SUMS]["tensors"] != tensors_checksum(tensors):
        raise AdapterError(f"{origin}: its tensors are not those that were written; take an undamaged copy")


def is_intact_copy(text: str, header: Mapping[str, Any]) -> bool:
    """Whether the text of the readable copy is one that `save_adapters` wrote, and nobody edited.

    A copy with a checksum may belong to another save than `header`: two processes may write to one directory, or one
    may be stopped between the two files. Then the tensor file alone counts. A copy without one must equal the header.
    """
    try:
        copy = _read_json(text, "")
    except AdapterError:
        return False
    if copy == header:
        return True
    sums = copy.get(_SUMS) if isinstance(copy, dict) else None
    return isinstance(sums, dict) and _is_sums(sums) and sums["header"] == _header_checksum(copy)


def has_checksums(header: Mapping[str, Any]) -> bool:
    """Whether the file was written with checksums."""
    return _SUMS in header


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_checksum(header: Mapping[str, Any]) -> str:
    """A SHA-256 of all values but itself."""
    plain = {**header, _SUMS: {"tensors": header[_SUMS]["tensors"]}}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read_json(text: str, origin: Path | str) -> Any:
    """JSON without keys that stand twice, deep nesting and text that is not Unicode.

    Raises:
        AdapterError: It is not such JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{origin} was not written by lit_adapters: its header is unreadable ({shown(str(error))})"
        ) from error
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _check_depth(value: Any) -> None:
    """Walk through a JSON value without recursion.

    Raises:
        ValueError: It is nested deeply, or holds text that is not Unicode.
    """
    level = [value]
    for _ in range(_DEEPEST):
        if not level:
            return
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                item.encode()  # raises for half of a surrogate pair
        level = inner
    raise ValueError(f"lists and objects are nested more than {_DEEPEST} deep")


class _Check:
    """Raises one kind of error for all values of a header."""

    def __init__(self, header: Mapping[str, Any], origin: Path | str) -> None:
        self.header, self.origin = header, origin

    def keys(self, place: str, value: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
        """Raise if a key is missing."""
        if missing := [key for key in wanted if key not in value]:
            raise AdapterError(f"{self.origin}: its header lacks {place}{missing[0]}; take an undamaged copy")

    def value(self, place: str, fits: Callable[[Any], bool], what: str) -> None:
        """Raise if the value at `place`, such as "base/shapes", does not fit."""
        value: Any = self.header
        for key in place.split("/"):
            value = value[key]
        if not fits(value):
            raise AdapterError(
                f"{self.origin}: {place} in its header is {shown(value)}, and must be {what}; take an undamaged copy"
            )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _is_methods(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(method, dict)
        and method.keys() <= {"class_path", "init_args"}
        and _is_name(method.get("class_path"))
        and isinstance(method.get("init_args", {}), dict)
        for method in value
    )


def _is_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_name, value)))


def _is_kinds(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_name, value.keys())) and all(map(_is_name, value.values()))


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(name) and _is_shape(shape) for name, shape in value.items())


def _is_shape(value: Any) -> bool:
    if not isinstance(value, str) or not _SHAPE.fullmatch(value):
        return False
    return math.prod(int(size) for size in value.split("x") if size) <= _MOST_ELEMENTS


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and all(map(WORD.fullmatch, value.split()))


def _is_unfrozen(value: Any, header: Mapping[str, Any]) -> bool:
    known = header["base"]["shapes"]
    return isinstance(value, dict) and all(n in known and isinstance(trains, bool) for n, trains in value.items())


def _is_sums(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"header", "tensors"} and all(map(_is_hash, value.values()))
