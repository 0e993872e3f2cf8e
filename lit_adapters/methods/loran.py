"""LoRAN: an elementwise function of the low-rank product as the update of a weight (arXiv 2509.21870).

    h = (W0 + s f(B A)) x        f applied to the full product, s = alpha / r outside f

f is Sinter, f(z) = z + a z sin(w z), with the constants of the released adapters, a = 5e-5 and w = 1e4, or one of
`lit_adapters.activations.weight_functions`. With these constants Sinter changes B A by at most 5e-5 of itself, which is
less than bfloat16 can represent; run function="identity" as a control. The update is a change of the weight, so that it
can be merged for every f.

One weight is formed for each forward, in float32, and the input is multiplied by it once. Training with dropout > 0
takes a second product, as dropout must not act on the path through W0. Parameters for each layer: r (in + out), and one
more with "sine", whose frequency is learned. Backward forms the weight again, so that nothing of its size is kept. The
phase w z is computed in float32 whatever the dtype of the model, and in float64 by the C++ kernel, which CPUs use.

The released merge adds the transposed update, and so works on square layers only; here any (out, in) merges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.activations.weight_functions import WEIGHT_FUNCTIONS, WeightUpdate
from lit_adapters.errors import AdapterError
from lit_adapters.methods.description import AdapterSummary, each_layer
from lit_adapters.methods.hooks import has_own_forward
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import ConvolutionLayer
from lit_adapters.ops._context import transformed, without_autocast
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.merged_linear import merged_linear, merged_weight
from lit_adapters.values import check_choice, check_flag, check_number

_NUDGE = 1e-3  # size of B A at the start where f is flat at 0, as a share of a freshly initialised weight


@dataclass
class LoRAN(LowRank):
    """Configuration of LoRAN; rank to rslora are those of `LowRank`.

    Args:
        function: The name of f: sinter, sine, cos, identity, sigmoid, tanh, relu, silu, swish25 or gaussian.
            swish25 is our reading of the released code's "swish(25x)" as z sigmoid(25 z).
        amplitude: a of Sinter.
        frequency: w of Sinter and of cos; the starting value for "sine".
        centered: Whether to use f(z) - f(0), so that B = 0 gives the pretrained layer for every f (ours); sigmoid(0) =
            0.5 would otherwise shift every weight at the start. relu is flat at 0 and would hold B there, so its B
            starts random and small, and the start is not exactly the pretrained layer.
        cache_weight: Whether to keep the formed weight (out * in values for each layer) while A and B stay the same,
            over the micro-batches of an accumulated gradient. In eval mode without gradients it is always kept.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "loran"
    multiplies_in_turn: ClassVar[bool] = False

    function: str = "sinter"
    amplitude: float = 5e-5
    frequency: float = 1e4
    centered: bool = True
    cache_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("function", self.function, WEIGHT_FUNCTIONS)
        check_number("amplitude", self.amplitude)
        check_number("frequency", self.frequency)
        check_flag("centered", self.centered)
        check_flag("cache_weight", self.cache_weight)
        if self.function == "sine" and self.frequency == 0:
            raise AdapterError("frequency 0 makes sine zero everywhere, and it would never learn; try 10 to 200")

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> LoRANAdapter:
        return LoRANAdapter(base, qualified_name, self)


class LoRANAdapter(LowRankAdapter):
    """h = (W0 + s f(B A)) x + bias for one layer; (..., in) -> (..., out)."""

    method = "loran"
    frequency: Tensor

    def __init__(self, base: nn.Module, qualified_name: str, config: LoRAN) -> None:
        super().__init__(base, qualified_name, config)
        self.update = WeightUpdate(config.function, self.scaling, config.amplitude, config.centered)
        self.cache_while_training = config.cache_weight
        self.initial_frequency = config.frequency
        self.calls_base = has_own_forward(base)  # a replaced `forward` may do more than multiply
        self._formed_weight: Cache[Tensor] = Cache()  # W0 + s f(B A) in the dtype of the products
        add = self.add_parameter if self.update.learns_frequency else self.add_buffer
        add("frequency", torch.empty((), device=self.lora_A.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero; small and random instead if f is flat at 0, where B = 0 would never train."""
        super().reset_parameters()
        with torch.no_grad():
            self.frequency.fill_(self.initial_frequency)
            if self.update.f.flat_at_zero:
                self.lora_B.normal_(std=_NUDGE / math.sqrt(self.rank))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The frequency if it is learned."""
        return [self.frequency] if isinstance(self.frequency, nn.Parameter) else []

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s f(B A), (out, in)."""
        return self.update.value(self.product(dtype), self.frequency.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        if self.can_stream():
            return self.streamed(x)
        dtype = self._compute_dtype(x)
        with without_autocast(x):
            wide = torch.promote_types(dtype, torch.float32)
            update = self.delta_weight(wide)  # s f(B A), (out, in)
            weight = self.base_matrix().to(wide) + update  # W0 + s f(B A)
        # Dropout must not act on the path through W0, and a replaced `forward` of the base is to be called.
        if (self.dropout > 0 and self.training) or self.calls_base:
            y = self.base(x)
            update = self.layer.stored(self.base, update.to(dtype))
            return y + self.layer.multiply(self.base, F.dropout(x, self.dropout, self.training), update).to(y.dtype)
        return self.layer.apply(self.base, x, self.layer.stored(self.base, weight.to(dtype)))

    def can_stream(self) -> bool:
        """Whether `streamed` may take the place of the formula.

        False for a convolution, whose weight is small compared to its input, under the transforms of torch.func,
        which need plain operations, and where the base has a `forward` of its own.
        """
        return not isinstance(self.layer, ConvolutionLayer) and not transformed() and not self.calls_base

    def streamed(self, x: Tensor) -> Tensor:
        """(W0 + s f(B A)) x + bias with the weight formed block by block, and again in the backward pass.

        In eval mode without gradients the formed weight is kept.
        """
        given, x = x.dtype, x.to(self._compute_dtype(x))
        separate = self.dropout > 0 and self.training  # dropout must not act on the path through W0
        weight, bias = (None, None) if separate else (self.base.weight, self.base.bias)
        formed = None if separate else self._cached_weight(x.dtype)
        if formed is not None and not torch.is_grad_enabled():
            with without_autocast(x):
                y = F.linear(x, formed, None if bias is None else bias.to(x.dtype))
            return y.to(given) if self.layer.keeps_dtype else y
        wide = torch.promote_types(x.dtype, torch.float32)
        y = merged_linear(
            F.dropout(x, self.dropout, self.training),
            weight,
            bias,
            self.lora_A.to(wide),
            self.lora_B.to(wide),
            self.frequency.to(wide),
            self.update,
            self._to_matrix,
            formed,
        )
        if separate:
            y = self.base(x) + y
        return y.to(given) if self.layer.keeps_dtype else y

    def _to_matrix(self, weight: Tensor) -> Tensor:
        return self.layer.matrix(self.base, weight)

    def _cached_weight(self, dtype: torch.dtype) -> Tensor | None:
        """W0 + s f(B A) in `dtype`, computed once; None if it must not be kept."""
        if not self.may_cache():
            return None
        sources = [self.base.weight, self.lora_A, self.lora_B, self.frequency]
        return self._formed_weight.get(sources, lambda: self._form_weight(dtype), key=dtype)

    def _form_weight(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(self.lora_A):
            a, b, frequency = self.lora_A.to(wide), self.lora_B.to(wide), self.frequency.to(wide)
            return merged_weight(self.base_matrix(), a, b, frequency, self.update, dtype)

    @torch.no_grad()
    def update_size(self) -> tuple[float, float]:
        """||s f(B A)||_F and ||f(B A) - B A||_F / ||B A||_F, from the whole product."""
        product = self.product(torch.float32)
        update = self.update.value(product, self.frequency)
        residual = (update / self.scaling - product).norm() / product.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return update.norm().item(), residual.item()

    def statistics(self) -> dict[str, float]:
        """relative_norm: ||s f(B A)||_F / ||W0||_F; nonlinearity: ||f(B A) - B A||_F / ||B A||_F."""
        size, residual = self.update_size()
        return {"relative_norm": size / self.base_norm(), "nonlinearity": residual}

    @torch.no_grad()
    def summary(self) -> AdapterSummary:
        """The norm of s f(B A), and the spectrum of s B A."""
        change, residual = self.update_size()
        return replace(super().summary(), change=change, note=f"|f(BA) - BA| / |BA| = {residual:.1e}")

    def charts(self) -> dict[str, str]:
        """As for any low-rank pair, and how far f(B A) is from linear."""
        title = "AFA, LoRAN: distance from linear, each layer"
        return {title: each_layer("nonlinearity")} | super().charts()
