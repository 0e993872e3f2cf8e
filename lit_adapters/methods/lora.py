"""LoRA: low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685), the linear baseline.

         x ──── W0 (frozen) ────┐
         │                      + ── h
         └── A (r, in) ── B (out, r) ── s

    h = W0 x + s B A x        s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A is Kaiming-uniform(a = sqrt 5), B zero: the start is the pretrained layer. r (in + out) parameters a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import LinearLayer


@dataclass
class LoRA(LowRank):
    """Configuration of LoRA; the settings are those of `LowRank`."""

    name: ClassVar[str] = "lora"
    exports: ClassVar[str] = "yes"

    def adapter(self, base: nn.Module, layer: LinearLayer, rank: int) -> LoRAAdapter:
        return LoRAAdapter(base, layer, rank, self)


class LoRAAdapter(LowRankAdapter):
    """h = W0 x + s B A x for one layer; (..., in) -> (..., out)."""

    method = "lora"

    def __init__(self, base: nn.Module, layer: LinearLayer, rank: int, config: LoRA) -> None:
        super().__init__(base, layer, rank, config)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x) if self.in_effect else self.unadapted(x)
