"""DoRA: weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353).

    h = m / ||W0 + s B A|| (W0 x + s B A x)        row norms (out,), m (out,) trained, at first ||W0||

The norm counts as a constant in the backward pass (section 4.3 of the paper). It comes from products of width r,

    ||W0 + s B A||^2 = ||W0||^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>        each summed over a row

so that no d x d matrix is formed, and ||W0||^2 is computed once. At the start m / norm is exactly 1, which gives the
pretrained layer. Parameters for each layer: r (in + out) + out. Dropout acts on the input of B A
only, where peft also drops the input of W0; without dropout both agree. Weight decay never acts on m.

`starts.py` has other starts of A and B. B A then stands for B A - B0 A0, a product of two factors of width 2 r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.description import AdapterSummary
from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.starts import StartedAdapter, StartedLowRank
from lit_adapters.ops._context import transformed, without_autocast
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.rescaled import scale_without_bias


@dataclass
class DoRA(StartedLowRank):
    """Configuration of DoRA; the settings are those of `LowRank`, and `start` of `StartedLowRank`."""

    name: ClassVar[str] = "dora"
    adapts_experts: ClassVar[bool] = True
    exports: ClassVar[str] = "yes"

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> DoRAAdapter:
        return DoRAAdapter(base, qualified_name, self)

    def wrap_experts(self, base: nn.Module, qualified_name: str, stacks: Sequence[str]) -> DoRAExperts:
        return DoRAExperts(base, qualified_name, self, stacks)


class DoRAAdapter(StartedAdapter):
    """h = m / ||W0 + s B A|| (W0 x + s B A x) + bias for one layer; (..., in) -> (..., out)."""

    method = "dora"
    magnitude: nn.Parameter
    base_square: Tensor

    def __init__(self, base: nn.Module, qualified_name: str, config: DoRA) -> None:
        super().__init__(base, qualified_name, config)
        outputs, device = self.lora_B.shape[0], self.lora_B.device
        self.add_parameter("magnitude", torch.empty(outputs, device=device))
        self.add_buffer("base_square", torch.empty(outputs, device=device), persistent=False)
        self._measured: Cache[Tensor] = Cache()  # ||W0||^2 of every row
        self._gain: Cache[Tensor] = Cache()  # m / ||W0 + s B A|| - 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B at their start, m the row norms of the pretrained weight."""
        super().reset_parameters()
        self._was_floating = False
        self._measured.clear()
        with torch.no_grad():
            self.magnitude.copy_(self.base_norm_square().sqrt())

    def recompute_buffers(self) -> None:
        """||W0||^2 of every row, if the weight is there."""
        self._measured.clear()
        self.base_norm_square()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The magnitudes, as a norm should not decay towards 0, and A and B where they start elsewhere."""
        return [self.magnitude, *super().undecayed_parameters()]

    @torch.no_grad()
    def _measure_base(self) -> Tensor:
        """||W0||^2 of every row (out,), float32; also written to `base_square`, which compiled graphs read.

        On the meta device nothing is measured.

        Raises:
            AdapterError: The weight was quantised after it was last measured.
        """
        weight = self.base.weight
        if self._was_floating and not weight.is_floating_point():
            raise AdapterError(
                f"{self.qualified_name!r} was quantised after DoRA had measured its weight; quantise first (move the "
                "model to its device), then attach"
            )
        self._was_floating = weight.is_floating_point()
        if weight.is_meta:
            return self.base_square
        square = self.base_matrix().float().square().sum(1)
        if type(square) is Tensor:  # no fake tensor of a trace
            self._buffers["base_square"] = square
        return square

    def base_norm_square(self) -> Tensor:
        """||W0||^2 of every row (out,), float32; measured again if the weight was replaced or written to.

        A graph of torch.compile assumes that the pretrained weight does not change.
        """
        if transformed():
            return self.base_matrix().float().square().sum(1)
        if torch.compiler.is_compiling():
            return self.base_square
        return self._measured.get([self.base.weight], self._measure_base)

    def weight_norm(self) -> Tensor:
        """||W0 + s B A|| of every row (out,), float32; a constant in the backward pass."""
        with torch.no_grad(), without_autocast(self.lora_A):
            a, b, matrix = self.right_factor(torch.float32), self.left_factor(torch.float32), self.base_matrix()
            # The wide product runs in the dtype of the weight, as casting the weight would cost as much as the product.
            half = torch.addmm((matrix @ a.to(matrix.dtype).T).float(), b, a @ a.T, alpha=self.scaling / 2)
            update = 2 * self.scaling * (half * b).sum(1)
            norm = (self.base_norm_square() + update).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            return norm.detach()  # a constant in forward mode too, which `no_grad` does not turn off

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """m / ||W0 + s B A|| (W0 + s B A) - W0 (out, in)."""
        matrix = self.base_matrix().to(dtype)
        adapted = matrix + self.scaling * self.product(dtype)
        norm = adapted.detach().square().sum(1).sqrt().clamp_min(torch.finfo(dtype).tiny)
        return (self.magnitude.to(dtype) / norm)[:, None] * adapted - matrix

    def forward(self, x: Tensor) -> Tensor:
        if (y := self.again(x)) is not None:
            return y
        if not self.in_effect:
            return self.unadapted(x)
        if self.can_fuse(x):
            if (y := self.short(x, self.gain_minus_one)) is not None:
                return y
            y = self.fused(x)  # W0 x + s B A x + bias, as in LoRA
        else:
            y = self.base(x)
            y = y + (self.scaling * self.up(self.down(x))).to(y.dtype)
        gain_minus_one, bias = self.gain_minus_one(), self.base.bias
        if self._can_scale_in_place(y, bias):
            return scale_without_bias(y, gain_minus_one, bias)
        # gain (W0 x + s B A x) + bias, as a change of y: exact at the start, where the gain is 1 and B is 0.
        product = y if bias is None else y - self.per_channel(bias.to(y.dtype))
        return y + (self.per_channel(gain_minus_one) * product).to(y.dtype)

    def _can_scale_in_place(self, y: Tensor, bias: Tensor | None) -> bool:
        """Whether the one kernel `scale_without_bias` may take the place of the formula: in a plain eager call."""
        frozen = bias is None or not bias.requires_grad
        plain = not torch.compiler.is_compiling() and not transformed() and not y.is_nested
        return self.layer.channel_dim == -1 and frozen and plain

    def per_channel(self, values: Tensor) -> Tensor:
        """One value for each output channel (out,), shaped to multiply the output."""
        return self.layer.per_channel(self.base, values)

    def gain_minus_one(self) -> Tensor:
        """m / ||W0 + s B A|| - 1 (out,); computed once for generation, not for every token."""
        if not self.may_cache():
            return self.magnitude / self.weight_norm() - 1
        sources = [self.base.weight, self.lora_A, self.lora_B, self.magnitude]
        return self._gain.get(sources, lambda: self.magnitude / self.weight_norm() - 1)

    def statistics(self) -> dict[str, float]:
        """relative_norm of s B A, as in LoRA, and magnitude_change, the rms of m / m0 - 1 over nonzero rows."""
        square = self.base_norm_square()
        rows = square > 0
        ratio = self.magnitude.detach()[rows] / square[rows].sqrt() - 1
        change = ratio.square().mean().sqrt().item() if rows.any() else 0.0
        return super().statistics() | {"magnitude_change": change}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            square = self.base_norm_square()
            if f"{prefix}magnitude" not in state_dict and not self._has_trained():  # another base
                with torch.no_grad():
                    self.magnitude.copy_(square.sqrt())

    def summary(self) -> AdapterSummary:
        """As for any low-rank pair, without the magnitudes."""
        return replace(super().summary(), note="magnitudes apart")


class DoRAExperts(ExpertsAdapter):
    """W'_e = m_e / ||W_e + s B_e A_e|| (W_e + s B_e A_e), the norm of each row a constant in the backward pass.

    Raises:
        AdapterError: As for all experts; or it is not known which dimension of a weight holds the outputs.
    """

    method = "dora"

    def __init__(self, base: nn.Module, qualified_name: str, config: DoRA, stacks: Sequence[str]) -> None:
        super().__init__(base, qualified_name, config, stacks)
        if not hasattr(base, "is_transposed"):
            raise AdapterError(
                f"{type(base).__name__} ({qualified_name!r}) does not say which dimension of its weights holds the "
                f"outputs, whose norms DoRA needs; use LoRA or LoRAN, or exclude=[{qualified_name!r}]"
            )
        for stack in stacks:
            count, outputs, _ = self.matrices(stack).shape
            self.add_parameter(f"{stack}_magnitude", torch.empty(count, outputs, device=self.pair(stack)[0].device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B as for LoRA, m the row norms of the pretrained weights."""
        super().reset_parameters()
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        for stack in self.merges_into:
            self.get_parameter(f"{stack}_magnitude").copy_(_row_norms(self.matrices(stack).float()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = any(f"{prefix}{name}" in state_dict for name in self.adapter_parameters())
        if not own and not any(self.pair(stack)[1].any() for stack in self.merges_into):  # another base
            self._measure()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The magnitudes."""
        return [self.get_parameter(f"{stack}_magnitude") for stack in self.merges_into]

    def adapted(self, stack: str, dtype: torch.dtype) -> Tensor:
        direction = self.matrices(stack).to(dtype) + self.scaling[stack] * self.product(stack, dtype)
        norm = _row_norms(direction.detach())
        return (self.get_parameter(f"{stack}_magnitude").to(dtype) / norm)[..., None] * direction


def _row_norms(matrices: Tensor) -> Tensor:
    return matrices.square().sum(-1).sqrt().clamp_min(torch.finfo(matrices.dtype).tiny)
