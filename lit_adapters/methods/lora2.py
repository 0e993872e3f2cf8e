"""LoRA^2: an SVD triple inside an outer pair, pruned to a target rank (Zhang et al., arXiv 2408.06854).

    x ──┬── W0 (out, in), frozen ─────────────────────────────────────────────+── h
        └── dropout ── A (k, in) ── B (r, k) ── * E (r,) ── C (k, r) ── D (out, k) ── * s ──┘

    h = W0 x + bias + s D C diag(E) B A x        s = alpha / (r + 1e-5)

The outer pair A, D has width k; r directions live in these k dimensions, each a row of B, an entry of E and a column of
C. E starts at zero and the rest from N(0, 0.02^2), so the layer starts as the pretrained one. It has
k (in + out) + 2 r k + r trained parameters, and its update has rank min(k, nonzero entries of E) at most.

With `target_rank`, directions are given up in training, over all layers together, by the sensitivity of E, B and C
(`sensitivity.py`): k entries for each row and column, where AdaLoRA has in and out. A penalty keeps the factors
orthogonal: the mean of ||P P^T - I||_F over A, B^T, C and D^T of all layers. Where r < k, B^T B and C C^T (k, k) cannot
be I, and the released code's penalty has a floor; B B^T and C^T C (r, r) are taken instead. The paper also names a term
between the two planes. No formula of it is known, and the released code leaves it out in effect; so does this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.allocation import RANK_CHARTS, Allocated, Allocation
from lit_adapters.methods.description import AdapterSummary, LowRankUpdate, each_layer, mean_over_layers
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.sensitivity import RankSchedule, SensitivityAllocator
from lit_adapters.methods.targets import Target, find_targets
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.ops._context import without_autocast
from lit_adapters.values import check_factor, check_number, check_probability, check_whole

_STD = 0.02
_MOST = 1 << 16
_OUTER = ("outer_down", "outer_up")


@dataclass
class LoRA2(Method):
    """Configuration of LoRA^2.

    Args:
        width: k, the width of the outer pair; at most the smaller side of every target. It sets the number of
            parameters, of which the directions take a small part.
        rank: r, the number of directions of a layer at the start.
        target_rank: The number of directions that are left at the end, on average over the layers; None to keep all.
            `AdapterCallback` gives them up.
        alpha: The update is multiplied by alpha / (rank + 1e-5).
        orthogonality: The factor of the penalty that keeps the factors orthogonal; `AdapterCallback` adds it.
        prune_from: The share of the training before the first direction is given up.
        prune_until: The share of the training from which the ranks are final.
        prune_every: Optimiser steps between two prunings.
        dropout: The probability of zeroing an input of the update while training.
        targets: "all-linear", a list of name suffixes, or a regular expression for whole names; convolutions and heads
            are reached by name.
        exclude: Name suffixes of modules to leave alone, with all that is inside them.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "lora2"
    kind: ClassVar[str] = "linear"

    width: int = 8
    rank: int = 8
    target_rank: int | None = None
    alpha: float = 16.0
    orthogonality: float = 0.1
    prune_from: float = 0.1
    prune_until: float = 0.7
    prune_every: int = 10
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()
        check_whole("width", self.width, high=_MOST)
        check_whole("rank", self.rank, high=_MOST)
        if self.target_rank is not None:
            check_whole("target_rank", self.target_rank, otherwise="or None")
            if self.target_rank >= self.rank:
                raise AdapterError(
                    f"target_rank {self.target_rank} is not below rank {self.rank}, so that no direction could be "
                    "given up: raise rank, or leave target_rank out to keep all directions"
                )
        check_factor("alpha", self.alpha)
        check_number("orthogonality", self.orthogonality, low=0.0)
        check_number("prune_from", self.prune_from, low=0.0, high=1.0)
        check_number("prune_until", self.prune_until, low=0.0, high=1.0)
        if self.prune_from >= self.prune_until:
            raise AdapterError(f"prune_from {self.prune_from} must be below prune_until {self.prune_until}")
        check_whole("prune_every", self.prune_every)
        check_probability("dropout", self.dropout)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """As for any method; the layers found share one budget of directions."""
        allocation = LoRA2Allocation(self)
        targets = find_targets(model, self, train)
        return [(t, partial(LoRA2Adapter, t.module, t.name, self, allocation)) for t in targets]

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> LoRA2Adapter:
        """The adapter around one layer by itself, with a budget of its own."""
        return LoRA2Adapter(base, qualified_name, self)

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule | None:
        """As for any method; the outer pair tells the sizes of the layer.

        Raises:
            AdapterError: A tensor of the outer pair is missing or no matrix.
        """
        for name in _OUTER:
            if name not in tensors:
                raise AdapterError(f"{qualified_name!r} lacks {name}")
            if tensors[name].dim() != 2 or not tensors[name].numel():
                raise AdapterError(f"{qualified_name}.{name} is {tuple(tensors[name].shape)}, and must be a matrix")
        layer = nn.Linear(tensors["outer_down"].shape[1], tensors["outer_up"].shape[0], bias=False, device="meta")
        return self.wrap(layer, qualified_name, nn.Module())


class LoRA2Allocation(Allocation):
    """What the layers of one LoRA2 share.

    Args:
        config: The method.
    """

    def __init__(self, config: LoRA2) -> None:
        self.orthogonality = config.orthogonality
        self.target_rank = config.target_rank
        self.schedule = RankSchedule(config.prune_from, config.prune_until, config.prune_every)

    def allocator(self, layers: Mapping[str, Any]) -> SensitivityAllocator:
        return SensitivityAllocator(layers, self.target_rank, self.schedule)


class LoRA2Adapter(Allocated, WeightAdapter):
    """h = W0 x + s D C diag(E) B A x for one layer; (..., in) -> (..., out).

    A, B, E, C, D are outer_down (k, in), inner_down (r, k), directions (r,), inner_up (k, r), outer_up (out, k).

    Raises:
        AdapterError: The layer has no weight matrix, is a convolution in groups, or is smaller than the width.
    """

    method = "lora2"
    outer_down: nn.Parameter
    inner_down: nn.Parameter
    directions: nn.Parameter
    inner_up: nn.Parameter
    outer_up: nn.Parameter

    def __init__(
        self, base: nn.Module, qualified_name: str, config: LoRA2, allocation: LoRA2Allocation | None = None
    ) -> None:
        super().__init__(base, qualified_name)
        if not self.layer.low_rank:
            raise AdapterError(
                f"{qualified_name!r} is a convolution in groups, which no pair of convolutions of rank r can follow; "
                f"use LoRAN, which works on the weight, or set exclude=[{qualified_name!r}]"
            )
        outputs, inputs = self.layer.size(self.base)
        if config.width > min(outputs, inputs):
            raise AdapterError(
                f"width {config.width} exceeds the size of {qualified_name!r} ({outputs} x {inputs}); lower width, or "
                f"set exclude=[{qualified_name!r}]"
            )
        self.width, self.rank, self.dropout = config.width, config.rank, config.dropout
        self.scaling = config.alpha / (config.rank + 1e-5)
        self.allocation = allocation or LoRA2Allocation(config)
        device = self.base.weight.device
        self.add_parameter("outer_down", torch.empty(self.width, inputs, device=device))
        self.add_parameter("inner_down", torch.empty(self.rank, self.width, device=device))
        self.add_parameter("directions", torch.empty(self.rank, device=device))
        self.add_parameter("inner_up", torch.empty(self.width, self.rank, device=device))
        self.add_parameter("outer_up", torch.empty(outputs, self.width, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E zero, the rest N(0, 0.02^2): the start is the pretrained layer."""
        nn.init.zeros_(self.directions)
        for matrix in (self.outer_down, self.inner_down, self.inner_up, self.outer_up):
            nn.init.normal_(matrix, std=_STD)

    # ---- the formula

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        y = self.base(x)  # W0 x + bias
        z = self.layer.down(self.base, F.dropout(x, self.dropout, self.training), self.outer_down.to(x.dtype))  # A x
        with without_autocast(x):
            up = self.left(torch.promote_types(z.dtype, torch.float32))
        return y + self.layer.up(self.base, z, up.to(z.dtype)).to(y.dtype)

    def left(self, dtype: torch.dtype) -> Tensor:
        """s D C diag(E) B (out, k) in `dtype`: all factors but A, as k is small."""
        inner = self.inner_up.to(dtype) @ (self.directions.to(dtype)[:, None] * self.inner_down.to(dtype))
        return self.outer_up.to(dtype) @ (self.scaling * inner)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s D C diag(E) B A, (out, in)."""
        return self.left(dtype) @ self.outer_down.to(dtype)

    # ---- training

    def direction_values(self) -> Tensor | None:
        """E, if directions are given up."""
        assert isinstance(self.allocation, LoRA2Allocation)
        return None if self.allocation.target_rank is None else self.directions

    def direction_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """E, the rows of B and the columns of C."""
        return {
            "directions": (self.directions, None),
            "inner_down": (self.inner_down, 0),
            "inner_up": (self.inner_up, 1),
        }

    def orthogonal_factors(self) -> list[tuple[nn.Parameter, bool]]:
        """A, B, C and D, each by the side on which it can be orthonormal."""
        few = self.rank < self.width
        return [(self.outer_down, True), (self.inner_down, few), (self.inner_up, not few), (self.outer_up, False)]

    # ---- what was learned

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """relative_norm: ||dW||_F / ||W0||_F. rank: the directions that are kept, where they are allocated."""
        left, right = self.left(torch.float64), self.outer_down.double()
        squared = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
        return {"relative_norm": squared.sqrt().item() / self.base_norm()} | self.rank_statistic()

    held_by_update = ("outer_down", "inner_down", "directions", "inner_up", "outer_up")

    def low_rank_update(self) -> LowRankUpdate:
        """s D C diag(E) B, and A."""
        return LowRankUpdate(self.left(torch.float32).detach(), self.outer_down.detach(), 1.0)

    def summary(self) -> AdapterSummary:
        """As for any update, with the rank that was allocated."""
        return self.with_rank(super().summary())

    def charts(self) -> dict[str, str]:
        """The size of the update, relative to the pretrained weight, and the ranks where they are allocated."""
        charts = {
            "weights: ||dW|| / ||W||, mean over layers": mean_over_layers("relative_norm"),
            "weights: ||dW|| / ||W||, each layer": each_layer("relative_norm"),
        }
        return charts if self.direction_values() is None else charts | RANK_CHARTS

    def extra_repr(self) -> str:
        return f"{self.base.extra_repr()}, width={self.width}, rank={self.rank}"
