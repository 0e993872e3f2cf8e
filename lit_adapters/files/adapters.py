"""Adapter directories: `lit_adapter.safetensors`, complete in itself, and `lit_adapter.json`, its readable header.

The tensor file carries the header in its metadata, so that one atomic rename replaces both together; the JSON copy is
for people and must agree. Nothing is pickled, and no file has a name that peft or transformers would read as theirs.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.atomic import write_together
from lit_adapters.files.base_name import base_name
from lit_adapters.files.card import CARD, card, may_write_card
from lit_adapters.files.checkpoint_schema import RECORD as RECORD  # an older place of the name
from lit_adapters.files.checkpoint_schema import check_checkpoint
from lit_adapters.files.fingerprint import differing, fingerprint, old_fingerprint
from lit_adapters.files.header import (
    FORMAT,
    check_tensors,
    check_text,
    has_checksums,
    header_text,
    is_intact_copy,
    parse_header,
)
from lit_adapters.files.hub import local_directory
from lit_adapters.files.meaning import HEADER_KEY, adopt_meaning, binding_meaning, check_same, checked, meaning_of
from lit_adapters.files.transfer import matching_train, named_as_in, warn_left_out, what_fits
from lit_adapters.methods.method import to_methods
from lit_adapters.methods.starts import without_starts
from lit_adapters.model.attach import attach, detach
from lit_adapters.model.meta import refuse_meta
from lit_adapters.model.named import adapter_names, in_use, use, using
from lit_adapters.model.ranks import kept_directions, warn_unallocated, with_ranks
from lit_adapters.model.record import (
    DEFAULT,
    adapters,
    attachment,
    base_parameters,
    inner,
    packed_buffers,
    unfrozen,
)
from lit_adapters.model.report import AdapterReport
from lit_adapters.model.sharding import is_sharded, whole
from lit_adapters.model.unfinished import warn_unfinished

TENSORS, HEADER = "lit_adapter.safetensors", "lit_adapter.json"
# What torch raises for a file that is damaged, or holds more than plain values.
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
)
_KEY = "lit_adapter"


def adapter_state(model: nn.Module, besides: Iterable[str] = ()) -> dict[str, Tensor]:
    """The content of an adapter file: the adapters' tensors, parameters of modules of `train`, the base's buffers.

    Args:
        model: The module given to `attach`.
        besides: Names of further base parameters.
    """
    state = attachment(model)
    tensors = {f"{name}.{key}": t for name, a in adapters(model) for key, t in a.adapter_tensors().items()}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    tensors |= {n: parameters[n] for n in (*state.trained_parameters, *besides)}
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
        AdapterError: The file is torn, holds more than tensors and plain values, or is no checkpoint of ours.
    """
    check_whole(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise AdapterError(
            f"{str(path)!r} cannot be read as a checkpoint of tensors and plain values: {str(error)[:1000]}"
        ) from error
    check_checkpoint(checkpoint, path)
    return checkpoint


def save_adapters(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write the adapters of `model`, and whatever else of it trains, to `directory`.

    The files are safetensors and JSON. Besides the adapters they hold the modules of `train`, base parameters that
    were unfrozen after `attach`, and the base's persistent buffers: running statistics move while the model trains,
    frozen or not. The tensor file is complete in itself, so that the one rename that puts it in place replaces the
    whole. If the model is sharded, every process must call this, and the first one writes.

    Args:
        model: The module given to `attach`.
        directory: Where to; created if missing.
        name: Of the adapters, if the model has several; by default the ones in use.

    Raises:
        AdapterError: The model has no adapters, or none of this name; several are in use together, a value to be saved
            is not finite or has no values yet, or the files cannot be written. Earlier files in `directory` are then as
            before.
    """
    model = inner(model)
    if name is not None:
        with using(model, name):
            save_adapters(model, directory)
        return
    attachment(model)
    warn_unfinished(model, str(directory))
    warn_unallocated(model, str(directory))
    write_adapters(model, Path(directory))


def write_adapters(model: nn.Module, directory: Path) -> None:
    """What `save_adapters` does, without its warnings: while a model trains, nothing has ended.

    Raises:
        AdapterError: As for `save_adapters`.
    """
    besides = unfrozen(model)
    state = adapter_state(model, besides)
    refuse_meta(state, "save_adapters")
    tensors = {n: whole(t).cpu().contiguous() for n, t in state.items()}
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise AdapterError(f"{broken[0]!r} is not finite; nothing was written to {directory}")
    frozen = _frozen(model, tensors)
    header = {
        "format": FORMAT,
        "lit_adapters": version("lit-adapters"),
        **describe(model),
        "methods": with_ranks(attachment(model).methods, model),
        "base": {
            "shapes": _base_shapes(model),
            "weights": old_fingerprint(frozen),
            "fingerprint": fingerprint(frozen),
            **base_name(model),
        },
    }
    if besides:
        header["unfrozen"] = besides
    if meaning := meaning_of(model):
        header[HEADER_KEY] = meaning
    text = header_text(header, tensors)
    together = is_sharded(model)
    if not together or torch.distributed.get_rank() == 0:
        about = {CARD: lambda path: path.write_text(card(header, tensors), encoding="utf-8")}
        # The copy comes first: a reader takes the tensor file's word, and accepts a copy from another save.
        write_together(
            directory,
            {
                **(about if may_write_card(directory) else {}),
                HEADER: lambda path: path.write_text(text + "\n", encoding="utf-8"),
                TENSORS: lambda path: save_file(tensors, path, metadata={_KEY: text}),
            },
        )
    if together:
        torch.distributed.barrier()  # whoever goes on finds the files


def load_adapters(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = DEFAULT,
    strict: Literal[True, "shapes"] = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AdapterReport:
    """Attach the saved methods to a base model and load their tensors.

    Args:
        model: The base model, without adapters of this name. If its weights differ from those the adapters were trained
            on, it is accepted with a warning.
        directory: What `save_adapters` wrote, or as text the name of a repository of the hub, to which `push` uploads
            ("user/name").
        name: The name of the adapters in the model; they are in use afterwards, see `use`.
        strict: True needs the very base that the adapters were trained on. "shapes" takes what fits a model with
            another image size, head or vocabulary: an adapter or trained parameter that is not there or has another
            shape stays at its start, and is in `left_out` of the report. What the file says of classes, normalisation
            and the like is then not applied.
        revision: A branch, tag or commit of that repository.
        token: For private repositories; by default the one that the user has logged in with.

    Raises:
        AssetError: There is neither such a directory nor such a repository, or the hub cannot be reached.
        AdapterError: The file is missing, torn, damaged, not ours or of a newer format; the base has other layers or
            shapes, or with strict="shapes" none that fits; tensors are missing, unexpected or of another kind; or the
            file's meaning (`lit_adapters.files.meaning`) contradicts the model's. The model is then as before.
    """
    directory = local_directory(directory, TENSORS, (HEADER,), revision, token)
    if strict is not True and strict != "shapes":
        raise AdapterError(f"strict {shown(strict)} must be True, or 'shapes' to take what fits another model")
    model, by_shapes = inner(model), strict == "shapes"
    before, mine = in_use(model), _base_shapes(model)
    header, tensors = named_as_in(*read_directory(directory), mine)
    for key in tensors.keys() & packed_buffers(model).keys():  # the base itself, in files of earlier versions
        del tensors[key]
    theirs = header["base"]["shapes"]
    different = [k for k in theirs if mine.get(k) != theirs[k]] + [k for k in mine if k not in theirs]
    if different and not by_shapes:
        key = different[0]
        raise AdapterError(
            f"{directory} belongs to another base model: {key!r} is {theirs.get(key, 'absent')} there and "
            f"{mine.get(key, 'absent')} here ({len(different)} parameters differ). Build the model that the adapters "
            "were trained on: same architecture, same number of classes; strict='shapes' takes what fits another one"
        )
    meaning = {} if by_shapes else checked(header.get(HEADER_KEY, {}), str(directory))
    check_same(meaning, binding_meaning(model), str(directory))
    besides: dict[str, bool] = {k: v for k, v in header.get("unfrozen", {}).items() if not by_shapes or k in mine}
    if besides and adapter_names(model):
        raise AdapterError(
            f"{directory} holds {next(iter(besides))!r} of the base, which was unfrozen and trained: it would change "
            "under the other adapters of this model; load it into a model of its own"
        )
    methods = to_methods(header["methods"])
    for part in (part for method in methods for part in method.parts()):
        part.follow_file(model, header["adapters"])
    with nullcontext() if by_shapes else without_starts():
        train = matching_train(model, header["train"]) if by_shapes else header["train"]
        report = attach(model, methods, train, name)
    with _as_before_on_error(model, (), name, before):
        expected = adapter_state(model, besides)
        if by_shapes:
            fitting, left_out = what_fits(model, header, tensors, expected)
            report.left_out.extend(left_out)
            warn_left_out(left_out, str(directory))
        else:
            fitting = tensors
            _check_fit(model, header, expected, tensors, directory)
    own = base_parameters(model).keys() | set(attachment(model).buffers)
    with _as_before_on_error(model, own & fitting.keys(), name, before):
        if not different and (others := _other_weights(model, header, tensors)):
            warnings.warn(
                f"{directory} was trained on other weights of this architecture{others}; results will differ",
                stacklevel=2,
            )
        if not has_checksums(header):
            _note_without_checksums()
        model.load_state_dict(fitting, strict=False, assign=any(t.is_meta for t in expected.values()))
    state, parameters = attachment(model), base_parameters(model)
    state.unfrozen = list(besides)
    for name, trains in besides.items():
        parameters[name].requires_grad_(trains)
        report.trained[name] = parameters[name].numel()
    adopt_meaning(model, meaning, str(directory))
    report.ranks.update({name: sum(kept) for name, kept in kept_directions(model).items()})
    return report


@contextmanager
def _as_before_on_error(
    model: nn.Module, tensors: Iterable[str], adapter: str, in_use_before: list[str]
) -> Iterator[None]:
    """Detach `adapter` if the block fails, and give the base's `tensors` their values again: all or nothing."""
    before: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    for name in tensors:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        table: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        before.append((table, attribute, table[attribute], table[attribute].detach().clone()))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for table, attribute, tensor, values in before:
                tensor.copy_(values)
                table[attribute] = tensor
        detach(model, adapter)
        use(model, in_use_before)
        raise


def _check_fit(
    model: nn.Module, header: dict[str, Any], expected: dict[str, Tensor], tensors: dict[str, Tensor], directory: Path
) -> None:
    """Check that the tensors of a file are those that the attached model needs.

    Raises:
        AdapterError: Tensors are missing, unexpected, or of another shape or dtype; or a layer has another method than
            the header says.
    """
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or unexpected or wrong:
        raise AdapterError(
            f"{directory} does not fit what its own header describes: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}, other shapes {wrong[:3]}"
        )
    own = {f"{name}.{key}" for name, a in adapters(model) for key in a.adapter_tensors()}
    for name, tensor in expected.items():
        found = tensors[name].dtype
        # What the base stores may have been cast; an adapter keeps its own dtype.
        if found != tensor.dtype and not (found.is_floating_point and tensor.is_floating_point() and name not in own):
            raise AdapterError(f"{directory}: {name!r} is {found}, and must be {tensor.dtype}; take an undamaged copy")
    described = describe(model)["adapters"]
    if other := [n for n in described if described[n] != header["adapters"].get(n)]:
        listed = shown(header["adapters"].get(other[0]))
        raise AdapterError(
            f"{directory} does not fit what its own header describes: {other[0]!r} has {listed} in its list of "
            f"adapters, and {described[other[0]]!r} by its methods"
        )


def _other_weights(model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """In a few words, which frozen weights of `model` differ from those the adapters were trained on; empty if none."""
    base, frozen = header["base"], _frozen(model, tensors)
    if "fingerprint" in base:
        names = differing(base["fingerprint"], frozen)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f" ({names[0]!r}{more})" if names else ""
    present = old_fingerprint(frozen)
    return " (some of them)" if None not in (present, base["weights"]) and present != base["weights"] else ""


@cache
def _note_without_checksums() -> None:
    """Say once that a file is of an earlier version."""
    warnings.warn(
        "this adapter directory was written without checksums, by lit_adapters 0.1: damage to its values would not be "
        "noticed. Saving it again adds them",
        stacklevel=3,
    )


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an adapter directory, both checked; no model is needed.

    Raises:
        AdapterError: The file is missing, torn, damaged, not ours or of a newer format; or the readable copy of its
            header was edited.
    """
    path = directory / TENSORS
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give the directory that save_adapters wrote")
    try:
        # Read in one go: `safe_open` opens the file by its name twice, between which another save may replace it.
        content = path.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        text = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get(_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is torn or not a safetensors file ({error})") from error
    if text is None:
        raise AdapterError(f"{path} was not written by lit_adapters: it has no {_KEY!r} header")
    header = parse_header(text, path)
    check_text(text, header, path)
    check_tensors(header, tensors, path)
    readable = directory / HEADER
    if readable.is_file() and not _is_copy(readable, header, len(text)):
        raise AdapterError(
            f"{readable} and {path} do not belong together (edited, or a write was interrupted); "
            f"delete {readable.name} to load what the tensor file holds"
        )
    return header, tensors


def _is_copy(readable: Path, header: dict[str, Any], length: int) -> bool:
    if readable.stat().st_size > 8 * length + (1 << 20):  # not read: it may be of any size
        return False
    try:
        return is_intact_copy(readable.read_text(encoding="utf-8"), header)
    except (OSError, UnicodeDecodeError):
        return False


def _frozen(model: nn.Module, saved: Collection[str]) -> dict[str, Tensor]:
    """The base model's parameters and packed weights that a file with the tensors `saved` does not hold."""
    return {n: t for n, t in (base_parameters(model) | packed_buffers(model)).items() if n not in saved}


def _base_shapes(model: nn.Module) -> dict[str, str]:
    """Shapes by name, such as "64x32"; a weight quantised by bitsandbytes counts with its shape before that."""
    parameters = base_parameters(model)
    shapes = {n: getattr(getattr(p, "quant_state", None), "shape", p.shape) for n, p in parameters.items()}
    return {n: "x".join(map(str, shape)) for n, shape in shapes.items()}
