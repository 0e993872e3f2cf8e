"""LoRA: low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685), the linear baseline.

         x ──── W0 (frozen) ────┐
         │                      + ── h
         └── A (r, in) ── B (out, r) ── s

    h = W0 x + s B A x        s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A is Kaiming-uniform(a = sqrt 5), B zero: the start is the pretrained layer. r (in + out) parameters a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.methods.layers import LinearLayer
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.ops.low_rank import low_rank_linear


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
        if self.in_effect and self._fuses(x):
            return self._fused(x)
        y = self.unadapted(x)
        return y + self.lifted(self.code(x)).to(y.dtype) if self.in_effect else y

    def _fuses(self, x: Tensor) -> bool:
        """Whether one pass does what the base layer, its hooks and the update would; a compiler fuses by itself."""
        base: Any = self.base
        plain = type(self.layer) is LinearLayer and type(base).forward is nn.Linear.forward
        if not plain or not x.is_contiguous() or torch.compiler.is_compiling() or (self.dropout > 0 and self.training):
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
        return frozen and (torch.is_autocast_enabled(x.device.type) or x.dtype == base.weight.dtype)

    def _fused(self, x: Tensor) -> Tensor:
        kind, base = x.device.type, self.base
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight: Any = base.weight.to(dtype)  # type: ignore[operator]
        bias: Any = None if base.bias is None else base.bias.to(dtype)  # type: ignore[operator]
        with torch.autocast(kind, enabled=False):
            return low_rank_linear(x.to(dtype), weight, bias, self.lora_A, self.lora_B, self.scaling)
