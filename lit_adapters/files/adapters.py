"""Adapter directories: `lit_adapter.safetensors`, complete in itself, and `lit_adapter.json`, its readable header.

The tensor file carries the header in its metadata, so that one atomic rename replaces both together; the JSON copy is
for people and must agree. Never pickle, never a name that peft or transformers would take for their own.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.atomic import write_atomically, write_text_atomically
from lit_adapters.files.meaning import HEADER_KEY, adopt_meaning, check_same, checked, meaning_of
from lit_adapters.model.attach import adapters, attach, attachment, detach
from lit_adapters.model.meta import refuse_meta
from lit_adapters.model.report import AdapterReport
from lit_adapters.model.sharding import is_sharded, whole

TENSORS, HEADER = "lit_adapter.safetensors", "lit_adapter.json"
_FORMAT = 1
_KEY = "lit_adapter"
_SAMPLES = 16
RECORD, RECORD_FORMAT = "lit_adapters", 1  # of the entry that Lightning checkpoints have


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The content of an adapter file: the adapters' tensors, parameters of modules of `train`, the base's buffers."""
    state = attachment(model)
    tensors = {f"{name}.{key}": t for name, a in adapters(model) for key, t in a.adapter_tensors().items()}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    tensors |= {n: parameters[n] for n in state.trained_parameters}
    tensors |= {n: buffers[n] for n in state.buffers}
    return {n: t.detach() for n, t in tensors.items()}


def describe(model: nn.Module) -> dict[str, Any]:
    """What `attach` did to `model`, as plain values: `methods`, `train`, and `adapters`, the method by layer name."""
    state = attachment(model)
    kinds = {name: adapter.method for name, adapter in adapters(model)}
    return {"methods": state.methods, "train": state.train, "adapters": kinds}


def check_whole(path: str | Path, option: str = "") -> None:
    """Raise if a file is not a whole archive as `torch.save` writes it.

    Args:
        path: The file.
        option: Where the path came from, for the message; ends in a space.

    Raises:
        AdapterError: The file is torn, or is not a checkpoint.
    """
    if not zipfile.is_zipfile(path):
        raise AdapterError(f"{option}{str(path)!r} is torn or not a checkpoint; give another one")


def read_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """A local Lightning checkpoint; its tensors are mapped into memory, and read when they are used.

    Raises:
        AdapterError: The file is torn, or holds more than tensors and plain values.
    """
    check_whole(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise AdapterError(
            f"{str(path)!r} cannot be read as a checkpoint of tensors and plain values: {error}"
        ) from error


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters of `model`, and its modules of `train`, to `directory`; each file is replaced atomically.

    The files are safetensors and JSON. The base's persistent buffers are written too: running statistics move while the
    model trains, frozen or not. If the model is sharded, every process must call this, and the first one writes.

    Args:
        model: The module given to `attach`.
        directory: Where to; created if missing.

    Raises:
        AdapterError: The model has no adapters, or a value to be saved is on the meta device or not finite.
    """
    directory = Path(directory)
    state = adapter_state(model)
    refuse_meta(state, "save_adapters")
    tensors = {n: whole(t).cpu().contiguous() for n, t in state.items()}
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise AdapterError(f"{broken[0]!r} is not finite; nothing was written to {directory}")
    header = {
        "format": _FORMAT,
        "lit_adapters": version("lit-adapters"),
        **describe(model),
        "base": {"shapes": _base_shapes(model), "weights": _fingerprint(model, tensors)},
    }
    if meaning := meaning_of(model):
        header[HEADER_KEY] = meaning
    text = json.dumps(header, indent=1)
    together = is_sharded(model)
    if not together or torch.distributed.get_rank() == 0:
        write_atomically(directory / TENSORS, lambda path: save_file(tensors, path, metadata={_KEY: text}))
        write_text_atomically(directory / HEADER, text + "\n")
    if together:
        torch.distributed.barrier()  # whoever goes on finds the files


def load_adapters(model: nn.Module, directory: str | Path) -> AdapterReport:
    """Attach the saved methods to a fresh base model and load their tensors; strict.

    Args:
        model: The base model, without adapters. If its sampled weights differ from those the adapters were trained
            on, it is accepted with a warning.
        directory: What `save_adapters` wrote.

    Raises:
        AdapterError: The file is missing, torn, not ours or of a newer format; the base has other layers or shapes;
            keys are missing or unexpected; or the file's meaning (`lit_adapters.files.meaning`) contradicts the
            model's. The model is then as before.
    """
    directory = Path(directory)
    header, tensors = read_directory(directory)
    mine, theirs = _base_shapes(model), header["base"]["shapes"]
    different = [k for k in theirs if mine.get(k) != theirs[k]] + [k for k in mine if k not in theirs]
    if different:
        key = different[0]
        raise AdapterError(
            f"{directory} belongs to another base model: {key!r} is {theirs.get(key, 'absent')} there and "
            f"{mine.get(key, 'absent')} here ({len(different)} parameters differ). Build the model that the adapters "
            "were trained on: same architecture, same number of classes"
        )
    meaning = checked(header.get(HEADER_KEY, {}), str(directory))
    check_same(meaning, meaning_of(model), str(directory))
    report = attach(model, header["methods"], header["train"])
    expected = adapter_state(model)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or unexpected or wrong:
        detach(model)
        raise AdapterError(
            f"{directory} does not fit what its own header describes: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}, other shapes {wrong[:3]}"
        )
    fingerprint = _fingerprint(model, tensors)
    if None not in (fingerprint, header["base"]["weights"]) and fingerprint != header["base"]["weights"]:
        warnings.warn(
            f"{directory} was trained on other weights of this architecture; results will differ", stacklevel=2
        )
    model.load_state_dict(tensors, strict=False, assign=any(t.is_meta for t in expected.values()))
    adopt_meaning(model, meaning, str(directory))
    return report


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an adapter directory; no model is needed.

    Raises:
        AdapterError: The file is missing, torn, not ours or of a newer format, or its header and the readable copy
            differ.
    """
    path = directory / TENSORS
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give the directory that save_adapters wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise AdapterError(f"{path} is torn or not a safetensors file ({error})") from error
    if text is None:
        raise AdapterError(f"{path} was not written by lit_adapters: it has no {_KEY!r} header")
    try:
        header = json.loads(text)
        form, writer = header["format"], header["lit_adapters"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path} was not written by lit_adapters: its {_KEY!r} header is unreadable") from error
    if form != _FORMAT:
        raise AdapterError(
            f"{path} has format {form!r}, this version reads {_FORMAT}; it was written by lit_adapters {writer}, "
            "install that version or a later one"
        )
    readable = directory / HEADER
    if readable.is_file():
        try:
            agrees = json.loads(readable.read_text(encoding="utf-8")) == header
        except ValueError:
            agrees = False
        if not agrees:
            raise AdapterError(
                f"{readable} and {path} do not belong together (edited, or a write was interrupted); "
                f"delete {readable.name} to load what the tensor file holds"
            )
    return header, tensors


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base model's parameters by name."""
    own = {id(p) for _, adapter in adapters(model) for p in adapter.adapter_parameters().values()}
    return {n: p for n, p in model.named_parameters() if id(p) not in own}


def _base_shapes(model: nn.Module) -> dict[str, str]:
    """Shapes by name, such as "64x32"; a weight quantised by bitsandbytes counts with its shape before that."""
    parameters = _base_parameters(model)
    shapes = {n: getattr(getattr(p, "quant_state", None), "shape", p.shape) for n, p in parameters.items()}
    return {n: "x".join(map(str, shape)) for n, shape in shapes.items()}


def _fingerprint(model: nn.Module, trained: Iterable[str]) -> str | None:
    """Hash of a few values of every frozen parameter, rounded to bfloat16 so that the storage dtype does not matter."""
    digest = hashlib.sha256()
    skip = set(trained)
    for name, parameter in sorted(_base_parameters(model).items()):
        if name in skip:
            continue
        if parameter.is_meta:
            return None
        flat = whole(parameter.detach()).reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
