"""Adapters as files hold them, without the base model: from an adapter directory or from a Lightning checkpoint.

Each adapter is built anew around a placeholder of its layer, which takes no memory, and given its saved tensors: what
follows from them alone (factors, scaling, coefficients, beta) is then available; its forward and base weight are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import RECORD, RECORD_FORMAT, TENSORS, read_checkpoint_file, read_directory
from lit_adapters.files.peft_lora import CONFIG
from lit_adapters.methods.base import AdapterModule, Method, to_methods
from lit_adapters.methods.low_rank import LowRank
from lit_adapters.methods.matrix_layers import LinearLayer
from lit_adapters.methods.nora import NoRA, NoRAActivation
from lit_adapters.model.targets import KEYWORDS, matches, within


@dataclass
class SavedLayer:
    """One adapted layer.

    Attributes:
        method: its name, as in the report of `attach`.
        tensors: by local name.
        adapter: with these tensors; None for a method that needs the base model to be built, as peft's do.
    """

    method: str
    tensors: dict[str, Tensor]
    adapter: AdapterModule | None

    @property
    def parameters(self) -> int:
        """Trained values; of a method that cannot be built here, all floating values, buffers included."""
        if self.adapter is None:
            return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())
        return sum(p.numel() for p in self.adapter.adapter_parameters().values())


@dataclass
class SavedAdapters:
    """What a directory or a checkpoint holds.

    Attributes:
        file: the file with the tensors.
        methods: as they were given to `attach`.
        layers: by qualified name.
        trained: sizes of the parameters of `train`, by name.
        module: class path of the LightningModule; None for a directory.
    """

    file: Path
    methods: list[Method]
    layers: dict[str, SavedLayer]
    trained: dict[str, int] = field(default_factory=dict)
    module: str | None = None


def is_directory(path: Path) -> bool:
    """Whether `path` is an adapter directory, and not a checkpoint.

    Raises:
        AdapterError: there is nothing, or a directory of peft or of something else.
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
    """Read an adapter directory, or a Lightning checkpoint that AdapterCallback had a part in.

    Layers of a checkpoint with several adapted models are named from the LightningModule, else from the model.

    Raises:
        AdapterError: missing, torn, foreign, newer, without adapters, or tensors that do not fit their description.
    """
    if is_directory(path):
        directory = path.parent if path.is_file() else path
        header, tensors = read_directory(directory)
        trained = {n: tensors[n].numel() for n in header["base"]["shapes"] if n in tensors}
        return SavedAdapters(
            directory / TENSORS, to_methods(header["methods"]), _layers(path, header, tensors), trained
        )
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
        saved.layers |= {shown + n: layer for n, layer in _layers(path, model, tensors).items()}
        saved.trained |= {shown + n: tensors[n].numel() for n in model["trained"]}
    return saved


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What AdapterCallback wrote about the adapters of a checkpoint, and its state dict.

    Raises:
        AdapterError: torn, foreign or newer, or without adapters.
    """
    content = read_checkpoint_file(path)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise AdapterError(f"{str(path)!r} is no Lightning checkpoint: it has no state_dict")
    record = content.get(RECORD)
    if not record or not record.get("models"):
        raise AdapterError(
            f"{str(path)!r} says nothing about adapters; train with lit_adapters.AdapterCallback, which records them, "
            "or save them with lit_adapters.save_adapters"
        )
    if record["format"] != RECORD_FORMAT:
        raise AdapterError(f"{str(path)!r} has format {record['format']!r}, this version reads {RECORD_FORMAT}; update")
    return record, content["state_dict"]


def _layers(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, SavedLayer]:
    """All layers that a description tells of, with their tensors."""
    parts = [part for method in to_methods(description["methods"]) for part in method.parts()]
    layers = {}
    for name, kind in description["adapters"].items():
        local = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
        method = _method_of(name, kind, parts)
        adapter = None if method is None else _placeholder(path, method, name, local)
        if adapter is None:
            layers[name] = SavedLayer(kind, {k: t for k, t in local.items() if k not in ("weight", "bias")}, None)
            continue
        expected = adapter.adapter_tensors()
        wrong = [k for k in expected if k not in local or local[k].shape != expected[k].shape]
        if wrong:
            found = tuple(local[wrong[0]].shape) if wrong[0] in local else "missing"
            raise AdapterError(
                f"{str(path)!r} does not fit its own description: {name}.{wrong[0]} is {found}, and should be "
                f"{tuple(expected[wrong[0]].shape)}"
            )
        own = {k: local[k] for k in expected}
        adapter.load_state_dict({k: t.clone() for k, t in own.items()}, strict=False, assign=True)
        layers[name] = SavedLayer(kind, own, adapter.eval())
    return layers


def _method_of(name: str, kind: str, parts: list[Method]) -> Method | None:
    """The method that adapts layer `name`: of its kind; the one that names the layer, if there are several."""
    known = [p for p in parts if p.name == kind and isinstance(p, (LowRank, NoRA))]
    candidates = [p for p in known if not within(name, tuple(p.exclude))]
    named = [p for p in candidates if p.targets not in tuple(KEYWORDS) and matches(name, p.targets)]
    return next(iter(named or candidates), None)


def _placeholder(path: Path, method: Method, name: str, tensors: Mapping[str, Tensor]) -> AdapterModule | None:
    """The adapter around a layer of the right size without values; None for methods of other kinds."""
    adapter: AdapterModule
    if isinstance(method, LowRank):
        if not {"lora_A", "lora_B"} <= tensors.keys():
            raise AdapterError(f"{str(path)!r} does not fit its own description: {name!r} lacks lora_A or lora_B")
        (rank, inputs), outputs = tensors["lora_A"].shape, tensors["lora_B"].shape[0]
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        adapter = method.adapter(layer, LinearLayer(), rank)
    elif isinstance(method, NoRA):
        # Which activation it was is not in the files, and what is asked of a placeholder does not depend on it.
        adapter = NoRAActivation(nn.GELU(), method, -1, torch.device("meta"))
    else:
        return None
    adapter.qualified_name = name
    return adapter
