"""DoRA: weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353).

    h = m / ||W0 + s B A|| (W0 x + s B A x)        row norms (out,), m (out,) trained, at first ||W0||

The norm counts as a constant in the backward pass (section 4.3 of the paper). It comes from products of width r,

    ||W0 + s B A||^2 = ||W0||^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>        each summed over a row

so that no d x d matrix is formed, and ||W0||^2 is computed once. At the start m / norm is exactly 1: the pretrained
layer. r (in + out) + out parameters a layer. Dropout acts on the input of B A alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.description import AdapterSummary
from lit_adapters.methods.keeping import KeepingAdapter
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import LinearLayer
from lit_adapters.ops._autocast import without_autocast
from lit_adapters.ops._transforms import transformed
from lit_adapters.ops.rescaled import rescaled


@dataclass
class DoRA(LowRank):
    """Configuration of DoRA; the settings are those of `LowRank`."""

    name: ClassVar[str] = "dora"
    exports: ClassVar[str] = "yes"

    def adapter(self, base: nn.Module, layer: LinearLayer, rank: int) -> DoRAAdapter:
        return DoRAAdapter(base, layer, rank, self)


class DoRAAdapter(KeepingAdapter, LowRankAdapter):
    """h = m / ||W0 + s B A|| (W0 x + s B A x) + bias for one layer; (..., in) -> (..., out)."""

    method = "dora"
    magnitude: nn.Parameter
    base_square: Tensor

    def __init__(self, base: nn.Module, layer: LinearLayer, rank: int, config: DoRA) -> None:
        super().__init__(base, layer, rank, config)
        outputs, device = self.lora_B.shape[0], self.lora_B.device
        self.add_parameter("magnitude", torch.empty(outputs, device=device))
        self.add_buffer("base_square", torch.empty(outputs, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero, m the row norms of the pretrained weight."""
        super().reset_parameters()
        self._measure_base()
        with torch.no_grad():
            self.magnitude.copy_(self.base_square.sqrt())

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The magnitudes: zero is no resting place of a norm."""
        return [self.magnitude]

    @torch.no_grad()
    def _measure_base(self) -> None:
        """Keep ||W0||^2 of every row (out,); on the meta device there is nothing to measure yet."""
        weight = self._parameters["weight"]
        assert weight is not None
        if not weight.is_meta:
            self._buffers["base_square"] = self.base_matrix().float().square().sum(1)
        self._measured = (weight, 0 if weight.is_inference() else weight._version, weight.is_floating_point())

    def _follow_base(self) -> None:
        """Measure again if the pretrained weight was replaced or written to; a compiled graph takes it as fixed.

        Raises:
            AdapterError: the weight was quantised since.
        """
        weight, version, floating = self._measured
        if floating and not self._parameters["weight"].is_floating_point():  # type: ignore[union-attr]
            raise AdapterError(
                f"{self.qualified_name!r} was quantised after DoRA had measured its weight; quantise first (move the "
                "model to its device), then attach"
            )
        if weight is not self._parameters["weight"] or (not weight.is_inference() and weight._version != version):
            self._measure_base()

    def weight_norm(self) -> Tensor:
        """||W0 + s B A|| of every row (out,), float32; a constant for the backward pass."""
        with torch.no_grad(), without_autocast(self.lora_A):
            if not torch.compiler.is_compiling():
                self._follow_base()
            a, b, matrix = self.lora_A.float(), self.lora_B.float(), self.base_matrix()
            # The wide product runs in the weight's own dtype: a float32 copy of the weight would cost as much as it.
            half = torch.addmm((matrix @ a.to(matrix.dtype).T).float(), b, a @ a.T, alpha=self.scaling / 2)
            update = 2 * self.scaling * (half * b).sum(1)
            norm = (self.base_square + update).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            return norm.detach()  # a constant in forward mode too, which `no_grad` does not stop

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """m / ||W0 + s B A|| (W0 + s B A) - W0, (out, in)."""
        matrix = self.base_matrix().to(dtype)
        adapted = matrix + self.scaling * self.product(dtype)
        norm = adapted.detach().square().sum(1).sqrt().clamp_min(torch.finfo(dtype).tiny)
        return (self.magnitude.to(dtype) / norm)[:, None] * adapted - matrix

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        y, bias = self.adapted(x), self.base.bias
        change, frozen = self._change(), bias is None or not bias.requires_grad
        if self.layer.channel_dim == -1 and frozen and not torch.compiler.is_compiling() and not transformed():
            return rescaled(y, change, bias)  # type: ignore[arg-type]
        over_channels = partial(self.layer.over_channels, self.base)
        plain = y if bias is None else y - over_channels(bias.to(y.dtype))  # type: ignore[arg-type]
        # As a change of y: exact at the start, where the gain is 1 and B is 0.
        return y + (over_channels(change) * plain).to(y.dtype)

    def _change(self) -> Tensor:
        """m / ||W0 + s B A|| - 1, (out,); for generation it is formed once, and not for every token."""
        if not self.may_keep():
            return self.magnitude / self.weight_norm() - 1
        tensors = [self._parameters["weight"], self.lora_A, self.lora_B, self.magnitude]
        return self.kept.get(self.magnitude.dtype, tensors, lambda: self.magnitude / self.weight_norm() - 1)

    def statistics(self) -> dict[str, float]:
        """relative_norm, of s B A as for LoRA; magnitude_change: rms of m / m0 - 1 over the rows that are not zero."""
        rows = self.base_square > 0
        ratio = self.magnitude.detach()[rows] / self.base_square[rows].sqrt() - 1
        change = ratio.square().mean().sqrt().item() if rows.any() else 0.0
        return super().statistics() | {"magnitude_change": change}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self._measure_base()
            if f"{prefix}magnitude" not in state_dict and not self.lora_B.any():  # another base, nothing trained yet
                with torch.no_grad():
                    self.magnitude.copy_(self.base_square.sqrt())

    def summary(self) -> AdapterSummary:
        """As for any pair; the magnitudes are not in it."""
        return replace(super().summary(), note="magnitudes apart")
