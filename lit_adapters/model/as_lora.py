"""Turns adapters of weights into LoRA of a rank, by truncated singular value decompositions of their updates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_adapters.console import text_table
from lit_adapters.errors import AdapterError
from lit_adapters.methods.lora import LoRA, LoRAAdapter
from lit_adapters.methods.targets import exactly, places
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.model.attach import attach, detach
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.record import adapters, attachment, base_parameters, inner, unfrozen
from lit_adapters.model.sharding import refuse_sharded
from lit_adapters.values import check_whole


@dataclass(frozen=True)
class LoRAReport:
    """What `to_lora` lost; `print` shows a table.

    Attributes:
        errors: ||dW - B A||_F / ||dW||_F by the name of the layer; 0 where there is no update.
        rank: The rank of the pairs.
    """

    errors: dict[str, float]
    rank: int

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        rows = [("layer", "error"), *((name, f"{error:.2e}") for name, error in self.errors.items())]
        return f"{text_table(rows)}\nLoRA of rank {self.rank}; the largest error of an update is {self.worst:.2e}"


def to_lora(model: nn.Module, rank: int) -> LoRAReport:
    """Replace the adapters of a model by LoRA of a rank, the best for each update dW in the Frobenius norm.

    dW = U S V^T, and B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T. This is exact where dW has at most this rank: LoRA2,
    NestedLoRA with `inner_rank`, AFA-LoRA after its annealing. LoRAN and VeRA have updates of full rank. The result
    merges, and `export_peft` writes it.

    Args:
        model: The module given to `attach`; changed in place.
        rank: r; smaller layers get their own size.

    Returns:
        The error of each layer; `print` shows a table.

    Raises:
        AdapterError: The model has no adapters; one of them is no update of a weight (NoRA, DenseLoRA, BitFit),
            nonlinear at present, or merged; or the model is sharded or on the meta device. The model is then as before.
    """
    check_whole("rank", rank)
    model = inner(model)
    refuse_sharded(model, "to_lora")
    require_loaded(model, "to_lora")
    found = dict(adapters(model))
    if not found:
        raise AdapterError(f"{type(model).__name__} has no adapters; call lit_adapters.attach(model, ...) first")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    for name, adapter in tqdm(found.items(), desc="to LoRA", unit="layer", leave=False, disable=None):
        if adapter.merged:
            raise AdapterError(f"{name!r} is merged; call lit_adapters.unmerge(model) first")
        if not isinstance(adapter, WeightAdapter) or list(adapter.merges_into) != ["weight"]:
            fix = "call lit_adapters.linearise first" if adapter.learned_functions() is not None else "exclude it"
            raise AdapterError(f"{name!r} has {adapter.method}, which is no update of a weight alone; {fix}")
        adapter.check_linear()
        factors[name], errors[name] = _pair(adapter, rank)
    install_lora(model, factors)
    return LoRAReport(errors, rank)


@torch.no_grad()
def _pair(adapter: WeightAdapter, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """A and B of the best approximation of an update, and its relative error."""
    update = adapter.delta_weight(torch.float64)
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = (root[:, None] * vh[:kept]).float(), (u[:, :kept] * root).float()
    size = torch.linalg.vector_norm(s).item()
    lost = torch.linalg.vector_norm(update - b.double() @ a.double()).item()
    return (a, b), lost / size if size > 0 else 0.0


def install_lora(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Take all adapters out, and put LoRA in. What else trains goes on to train.

    Args:
        model: With its adapters.
        factors: A (r, in) and B (out, r) by the name of the layer, with the update B A; r is at most the layer's size.
    """
    before, trains = attachment(model), unfrozen(model)
    layers = {id(model.get_submodule(name)): name for name in factors}
    # A layer may stand at several places.
    of_place = {p.name: layers[id(p.module)] for p in places(model) if id(p.module) in layers}
    ranks = {re.escape(place): len(factors[name][0]) for place, name in of_place.items()}
    ((common, _),) = Counter(ranks.values()).most_common(1)
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    method = LoRA(
        rank=common, alpha=float(common), targets=exactly(list(of_place), model), rank_pattern=pattern or None
    )
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = {n: tensors[n].detach().clone() for n in (*before.trained_parameters, *before.buffers)}
    (own_name,) = before.names
    detach(model, own_name)
    attach(model, method, before.train, own_name)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, values in trained.items():
            tensors[name].copy_(values)
    state, parameters = attachment(model), base_parameters(model)
    # What was frozen at first and has trained since belongs to the model's files.
    state.samples, state.unfrozen, state.required_grad = before.samples, list(trains), before.required_grad
    for name, value in trains.items():
        parameters[name].requires_grad_(value)
    with torch.no_grad():
        for name, adapter in adapters(model):
            assert isinstance(adapter, LoRAAdapter)
            a, b = factors[name]
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b / adapter.scaling)
