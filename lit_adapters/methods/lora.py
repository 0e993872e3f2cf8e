"""LoRA: low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685), the linear baseline.

         x ──── W0 (frozen) ────┐
         │                      + ── h
         └── A (r, in) ── B (out, r) ── s

    h = W0 x + s B A x        s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A is Kaiming-uniform(a = sqrt 5), B zero: the start is the pretrained layer. r (in + out) parameters a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule, Method, WeightAdapter


@dataclass
class LoRA(Method):
    """Configuration of LoRA.

    Args:
        rank: r, the rank of the update; at most the smaller side of every target.
        alpha: the update is multiplied by alpha / rank.
        dropout: probability of zeroing an input of the low-rank branch while training.
        targets: "all-linear" (the head excluded), a list of name suffixes, or a regular expression for whole names.
        exclude: name suffixes of modules to leave alone.
        rank_pattern: rank by regular expression on the whole name, where it differs from `rank`.
        rslora: divide alpha by sqrt(rank) instead of rank.

    Raises:
        AdapterError: a value is out of range.
    """

    name: ClassVar[str] = "lora"
    kind: ClassVar[str] = "linear"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    rank_pattern: Mapping[str, int] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        self.normalise_targets()
        for rank in (self.rank, *(self.rank_pattern or {}).values()):
            if rank < 1:
                raise AdapterError(f"rank {rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"dropout {self.dropout} must lie in [0, 1)")

    def rank_for(self, qualified_name: str) -> int:
        """The rank of one target."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if re.fullmatch(pattern, qualified_name):
                return rank
        return self.rank

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        if not isinstance(base, nn.Linear):
            raise AdapterError(
                f"{type(self).__name__} adapts nn.Linear layers; {qualified_name!r} is a {type(base).__name__}. "
                f"Leave it out with exclude=[{qualified_name!r}]"
            )
        if "weight" not in base._parameters:
            raise AdapterError(
                f"the weight of {qualified_name!r} is computed by a parametrisation; remove that "
                f"(torch.nn.utils.parametrize.remove_parametrizations), or set exclude=[{qualified_name!r}]"
            )
        rank = self.rank_for(qualified_name)
        if rank > min(base.in_features, base.out_features):
            raise AdapterError(
                f"rank {rank} exceeds the size of {qualified_name!r} ({base.out_features} x {base.in_features}); "
                f"lower rank, or give this layer its own in rank_pattern"
            )
        return LoRALinear(base, rank, self.alpha / (math.sqrt(rank) if self.rslora else rank), self.dropout)


class LoRALinear(WeightAdapter):
    """h = W0 x + s B A x for one linear layer; (..., in) -> (..., out)."""

    method = "lora"
    base: nn.Linear
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = base.weight.device
        self.add_parameter("lora_A", torch.empty(rank, base.in_features, device=device))
        self.add_parameter("lora_B", torch.empty(base.out_features, rank, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A, (out, in): what merging adds to the weight."""
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled or self.merged:
            return y
        code = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return y + (self.scaling * F.linear(code, self.lora_B.to(code.dtype))).to(y.dtype)

    def statistics(self) -> dict[str, float]:
        """relative_norm: ||s B A||_F / ||W0||_F, from the r x r products alone (the d x d update is never formed)."""
        a, b = self.lora_A.detach().double(), self.lora_B.detach().double()
        squared = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
        weight = self.original_weight().detach().double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        return {"relative_norm": (self.scaling * squared.sqrt() / weight).item()}

    def extra_repr(self) -> str:
        return f"{self.base.extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"
