"""Read adapters without the base model, from an adapter directory or from a Lightning checkpoint.

`Method.placeholder` builds each adapter around a layer on the meta device, which takes no memory, and the saved tensors
are loaded into it. What follows from them alone (factors, scaling, coefficients, beta) is then available; its forward
and its base weight are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import TENSORS, read_checkpoint_file, read_directory
from lit_adapters.files.checkpoint_schema import RECORD
from lit_adapters.files.peft_lora import CONFIG
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.biased import BIAS, with_bias
from lit_adapters.methods.method import Method, to_methods
from lit_adapters.methods.targets import KEYWORDS, matches, within

_BASE_PARAMETERS = ("weight", "bias")  # names that plain layers give their own parameters


@dataclass
class SavedLayer:
    """One adapted layer.

    Attributes:
        method: The method's name, as in the report of `attach`.
        tensors: The saved tensors by local name.
        adapter: The adapter with these tensors; None for a method that needs the base model to be built, as peft's do.
        merges: Whether layers of the method merge into weights, in a few words (`Method.merges`).
    """

    method: str
    tensors: dict[str, Tensor]
    adapter: AdapterModule | None
    merges: str = "yes"

    @property
    def parameters(self) -> int:
        """The number of trained values; without an adapter, that of all floating values, buffers included."""
        if self.adapter is None:
            return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())
        return sum(p.numel() for p in self.adapter.adapter_parameters().values())


@dataclass
class SavedAdapters:
    """What a directory or a checkpoint holds.

    Attributes:
        file: The file with the tensors.
        methods: The methods as they were given to `attach`.
        layers: The adapted layers by qualified name.
        trained: Sizes of the parameters of `train`, by name.
        module: Class path of the LightningModule; None for a directory.
    """

    file: Path
    methods: list[Method]
    layers: dict[str, SavedLayer]
    trained: dict[str, int] = field(default_factory=dict)
    module: str | None = None


def is_directory(path: Path) -> bool:
    """Whether `path` is an adapter directory (or its tensor file), and not a checkpoint.

    Raises:
        AdapterError: The path does not exist, or is a directory that `save_adapters` did not write.
    """
    if path.is_file() and path.name != TENSORS:
        return False
    directory = path.parent if path.is_file() else path
    if not path.exists():
        raise AdapterError(f"{str(path)!r} does not exist; give an adapter directory or a Lightning checkpoint")
    if not (directory / TENSORS).is_file():
        if (directory / CONFIG).is_file():
            raise AdapterError(f"{str(path)!r} was saved by peft; run lit-adapters import-peft on it first")
        raise AdapterError(f"{str(path)!r} has no {TENSORS}; give the directory that save_adapters wrote, or a .ckpt")
    return True


def read_saved(path: Path) -> SavedAdapters:
    """Read an adapter directory, or a Lightning checkpoint of a run with AdapterCallback.

    In a checkpoint of several adapted models, layer names begin at the LightningModule; otherwise at the model.

    Raises:
        AdapterError: The file is missing, torn, not ours, of a newer format or without adapters, or its tensors do not
            fit its description.
    """
    if is_directory(path):
        directory = path.parent if path.is_file() else path
        header, tensors = read_directory(directory)
        trained = {n: tensors[n].numel() for n in header["base"]["shapes"] if n in tensors}
        layers = _layers(path, header, tensors, header["base"]["shapes"])
        return SavedAdapters(directory / TENSORS, to_methods(header["methods"]), layers, trained)
    record, state = read_checkpoint(path)
    models = record["models"]
    saved = SavedAdapters(path, [], {}, module=record["module"])
    for name, model in models.items():
        inside = f"{name}." if name else ""
        tensors = {k.removeprefix(inside): t for k, t in state.items() if k.startswith(inside)}
        if lacking := [n for n in model["trained"] if n not in tensors]:
            raise AdapterError(f"{str(path)!r} lacks {lacking[0]!r}, which trained: it was changed after training")
        shown = inside if len(models) > 1 else ""
        saved.methods += to_methods(model["methods"])
        saved.layers |= {shown + n: layer for n, layer in _layers(path, model, tensors, {}).items()}
        saved.trained |= {shown + n: tensors[n].numel() for n in model["trained"]}
    return saved


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of AdapterCallback in a checkpoint, and the state dict.

    Raises:
        AdapterError: The file is torn, not a Lightning checkpoint, of a newer format or without adapters.
    """
    content = read_checkpoint_file(path)
    record = content.get(RECORD)
    if not record or not record.get("models"):
        raise AdapterError(
            f"{str(path)!r} says nothing about adapters; train with lit_adapters.AdapterCallback, which records them, "
            "or save them with lit_adapters.save_adapters"
        )
    return record, content["state_dict"]


def _layers(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Mapping[str, str]
) -> dict[str, SavedLayer]:
    """Every layer that a description lists, with its tensors.

    Args:
        path: For messages.
        description: `methods`, and the method's name by adapted layer.
        tensors: Of the whole file.
        shapes: Shapes of the base model's parameters, such as "64x32", where the file records them.
    """
    parts = [part for method in to_methods(description["methods"]) for part in method.parts()]
    layers: dict[str, SavedLayer] = {}
    built: list[dict[str, AdapterModule]] = [{} for _ in parts]
    for name, kind in description["adapters"].items():
        local = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
        method = _method_of(name, kind, parts)
        try:
            adapter = None if method is None else method.placeholder(name, local, _base_shapes(name, local, shapes))
        except AdapterError as error:
            raise AdapterError(f"{str(path)!r} does not fit its own description: {error}") from error
        if adapter is not None and BIAS in local:  # of BitFit, beside the method that `kind` names
            adapter = with_bias(adapter) or adapter
        merges = "" if method is None else method.merges
        if adapter is None:
            own = {k: t for k, t in local.items() if k not in _BASE_PARAMETERS}
            layers[name] = SavedLayer(kind, own, None, merges)
            continue
        expected = adapter.adapter_tensors()
        wrong = [k for k in expected if k not in local or _kind(local[k]) != _kind(expected[k])]
        if wrong:
            found = _kind(local[wrong[0]]) if wrong[0] in local else "missing"
            raise AdapterError(
                f"{str(path)!r} does not fit its own description: {name}.{wrong[0]} is {found}, and should be "
                f"{_kind(expected[wrong[0]])}"
            )
        own = {k: local[k] for k in expected}
        adapter.load_state_dict({k: t.detach().clone() for k, t in own.items()}, strict=False, assign=True)
        layers[name] = SavedLayer(kind, own, adapter.eval(), merges)
        built[next(i for i, part in enumerate(parts) if part is method)][name] = adapter
    for part, adapters in zip(parts, built, strict=True):
        try:
            part.join(adapters)
        except AdapterError as error:
            raise AdapterError(f"{str(path)!r} does not fit its own description: {error}") from error
    return layers


def _kind(tensor: Tensor) -> str:
    """Shape, dtype and layout of a tensor, such as "(2, 4) torch.float32"."""
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout}"


def _base_shapes(name: str, tensors: Mapping[str, Tensor], recorded: Mapping[str, str]) -> dict[str, list[int]]:
    """Shapes of the base layer's own parameters, as the file records them or as whole checkpoints hold them."""
    shapes = {key: list(tensors[key].shape) for key in _BASE_PARAMETERS if key in tensors}
    for key in _BASE_PARAMETERS:
        if text := recorded.get(f"{name}.{key}"):
            shapes[key] = [int(size) for size in text.split("x")]
    return shapes


def _method_of(name: str, kind: str, parts: list[Method]) -> Method | None:
    """The method that adapts layer `name`: of its kind; the one that names the layer, if there are several."""
    known = [p for p in parts if p.name == kind]
    if len(known) < 2:
        return next(iter(known), None)
    candidates = [p for p in known if not within(name, tuple(p.exclude))]
    named = [p for p in candidates if p.targets not in tuple(KEYWORDS) and matches(name, p.targets)]
    return next(iter(named or candidates), None)
