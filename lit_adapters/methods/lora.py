"""LoRA: low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685), the linear baseline.

    x ──┬── W0 (out, in), frozen ───────────────────────+── h
        └── dropout ── A (r, in) ── B (out, r) ── * s ──┘

    h = W0 x + bias + s B A x        s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A starts Kaiming-uniform(a = sqrt 5), B at zero, so the layer starts as the pretrained one. It has r * (in + out)
trained parameters. `starts.py` has other starts; the update then is s (B A - B0 A0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.starts import StartedAdapter, StartedLowRank


@dataclass
class LoRA(StartedLowRank):
    """Configuration of LoRA; the settings are those of `LowRank`, and `start` of `StartedLowRank`."""

    name: ClassVar[str] = "lora"
    adapts_experts: ClassVar[bool] = True
    exports: ClassVar[str] = "yes"

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> LoRAAdapter:
        return LoRAAdapter(base, qualified_name, self)

    def wrap_experts(self, base: nn.Module, qualified_name: str, stacks: Sequence[str]) -> LoRAExperts:
        return LoRAExperts(base, qualified_name, self, stacks)


class LoRAAdapter(StartedAdapter):
    """h = W0 x + s B A x for one layer; (..., in) -> (..., out)."""

    method = "lora"
    has_branch = True
    needs_weight = False

    def __init__(self, base: nn.Module, qualified_name: str, config: LoRA) -> None:
        super().__init__(base, qualified_name, config)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if (y := self.again(x)) is not None:
            return y
        if not self.in_effect:
            return self.unadapted(x)
        if self.can_fuse(x):  # the usual path: the same formula in fewer operations, see ops/low_rank.py
            return y if (y := self.short(x)) is not None else self.fused(x)
        y = self.base(x)  # W0 x + bias
        return y + self.branch(x).to(y.dtype)

    def branch(self, x: Tensor) -> Tensor:
        """s B A x; (..., in) -> (..., out)."""
        return self.scaling * self.up(self.down(x))


class LoRAExperts(ExpertsAdapter):
    """W'_e = W_e + s B_e A_e."""

    method = "lora"

    def __init__(self, base: nn.Module, qualified_name: str, config: LoRA, stacks: Sequence[str]) -> None:
        super().__init__(base, qualified_name, config, stacks)
        self.reset_parameters()

    def adapted(self, stack: str, dtype: torch.dtype) -> Tensor:
        return self.matrices(stack).to(dtype) + self.scaling[stack] * self.product(stack, dtype)
