"""LoRAN: an elementwise function of the low-rank product as the update of a weight (arXiv 2509.21870).

    h = (W0 + s f(B A)) x        f applied to the full product, s = alpha / r outside f

f is Sinter, f(z) = z + a z sin(w z), with the constants of the released adapters, a = 5e-5 and w = 1e4, or one of
`lit_adapters.activations.weight_functions`. With these constants Sinter changes B A by at most 5e-5 of itself, which is
less than bfloat16 can represent; run function="identity" as a control. The update is a change of the weight, so that it
can be merged for every f.

frequency="calibrate" (ours) lets f act at the size that B A has at present: f_1(w z) / w in place of f(z), with f_1 the
function at frequency 1 and w = 1 / rms(B A). w is computed from A and B in every forward, through r x r products, and
is a constant for the gradient. So it is always current, no file holds it, and merging uses the value of training.

start_size > 0 (ours) starts at a random B0 and subtracts the effect of B0 A0: h = (W0 + s f(B A) - s f(B0 A0)) x.
W0 is not touched, so that it may be quantised; A0 and B0 are buffers.

One weight is formed for each forward, in float32, and the input is multiplied by it once. Training with dropout > 0
takes a second product, as dropout must not act on the path through W0. Parameters for each layer: r (in + out), and one
more with "sine", whose frequency is learned unless it is calibrated. Backward forms the weight again, so that nothing
of its size is kept. The phase w z is computed in float32 whatever the dtype of the model, and in float64 by the C++
kernel, which CPUs use.

Sine-LoRA (arXiv 2403.19243) is function="fixed_sine" with divide_by_root=True: s sin(w B A) / sqrt(in), w constant.

The released merge adds the transposed update, and so works on square layers only; here any (out, in) merges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.activations.weight_functions import (
    FLAT_START,
    WEIGHT_FUNCTIONS,
    WeightUpdate,
    calibrated_frequency,
    rms_of_product,
)
from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.description import AdapterSummary, LowRankUpdate, each_layer
from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.hooks import has_own_forward
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import ConvolutionLayer
from lit_adapters.methods.short_call import ShortCall, is_short
from lit_adapters.ops._context import autocast_dtype, transformed, without_autocast
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.merged_linear import merged_linear, merged_weight
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.values import check_choice, check_flag, check_number

_LEAST_PHASE = 0.1  # radians; below, a sine differs from its argument by less than a hundredth
_SAMPLE = 64  # rows of B A from which `nonlinear_share` is computed


@dataclass
class LoRAN(LowRank):
    """Configuration of LoRAN; rank to rslora are those of `LowRank`.

    Args:
        function: The name of f: sinter, sine (its frequency is learned), fixed_sine (its frequency is constant), cos,
            identity, sigmoid, tanh, relu, silu, swish25 or gaussian. swish25 is our reading of the released code's
            "swish(25x)" as z sigmoid(25 z).
        amplitude: a of Sinter: the largest share of B A by which it changes B A, with every frequency. Other functions
            have no amplitude; a calibrated sine is divided by w, so that its slope at 0 is 1.
        frequency: w of Sinter and of cos; the starting value for "sine". "calibrate" keeps w at 1 / rms(B A), for every
            function: f(w z) / w with w = 1 inside f. Set amplitude to about 1 with it, as Sinter is linear otherwise.
        centered: Whether to use f(z) - f(0), so that B = 0 gives the pretrained layer for every f (ours); sigmoid(0) =
            0.5 would otherwise shift every weight at the start. relu is flat at 0 and would hold B there, so its B
            starts random and small, and the start is not exactly the pretrained layer unless `start_size` is given.
        cache_weight: Whether to keep the formed weight (out * in values for each layer) while A and B stay the same,
            over the micro-batches of an accumulated gradient. In eval mode without gradients it is always kept.
        start_size: 0 starts at B = 0. Otherwise B starts random, and what B A does at the start is subtracted, so that
            the start is the pretrained layer up to rounding for every f, centred or not. The number is the root mean
            square of B A at the start over that of a freshly initialised weight, 1 / sqrt(3 in); 0.01 is about what
            training reaches. Adds r (in + out) fixed numbers to the file.
        divide_by_root: Whether to divide s by sqrt(in), as Sine-LoRA does. in is the number of columns of the weight.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "loran"
    adapts_experts: ClassVar[bool] = True
    multiplies_in_turn: ClassVar[bool] = False

    function: str = "sinter"
    amplitude: float = 5e-5
    frequency: float | Literal["calibrate"] = 1e4
    centered: bool = True
    cache_weight: bool = False
    start_size: float = 0.0
    divide_by_root: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("function", self.function, WEIGHT_FUNCTIONS)
        check_number("amplitude", self.amplitude)
        if isinstance(self.frequency, str) and self.frequency != "calibrate":
            raise AdapterError(f"frequency {shown(self.frequency)} must be a finite number or 'calibrate'")
        if not isinstance(self.frequency, str):
            check_number("frequency", self.frequency)
        check_flag("centered", self.centered)
        check_flag("cache_weight", self.cache_weight)
        check_number("start_size", self.start_size, 0.0, 1e3)
        check_flag("divide_by_root", self.divide_by_root)
        if self.function in ("sine", "fixed_sine") and self.frequency == 0:
            raise AdapterError(
                f"frequency 0 makes {self.function} zero everywhere, and it would never learn; use 'calibrate', or "
                "1,000 to 5,000 with alpha divided by the frequency"
            )

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> LoRANAdapter:
        return LoRANAdapter(base, qualified_name, self)

    def wrap_experts(self, base: nn.Module, qualified_name: str, stacks: Sequence[str]) -> LoRANExperts:
        return LoRANExperts(base, qualified_name, self, stacks)


class LoRANAdapter(LowRankAdapter):
    """h = (W0 + s f(B A)) x + bias for one layer; (..., in) -> (..., out)."""

    method = "loran"
    frequency: Tensor  # w, a scalar; absent if it is calibrated

    def __init__(self, base: nn.Module, qualified_name: str, config: LoRAN) -> None:
        super().__init__(base, qualified_name, config)
        if config.divide_by_root:
            self.scaling /= math.sqrt(self.lora_A.shape[1])
        calibrated = config.frequency == "calibrate"
        self.update = WeightUpdate(config.function, self.scaling, config.amplitude, config.centered, calibrated)
        self.cache_while_training = config.cache_weight
        self.initial_frequency = 1.0 if isinstance(config.frequency, str) else config.frequency
        self.start_size = config.start_size
        self.calls_base = has_own_forward(base)  # a replaced `forward` may do more than multiply
        self._formed_weight: Cache[Tensor] = Cache()  # W0 + s f(B A) in the dtype of the products
        if not calibrated:
            add = self.add_parameter if self.update.learns_frequency else self.add_buffer
            add("frequency", torch.empty((), device=self.lora_A.device))
        if self.start_size:
            self.add_start()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero; small and random instead with `start_size`, or if f is flat at 0."""
        super().reset_parameters()
        with torch.no_grad():
            if not self.update.calibrated:
                self.frequency.fill_(self.initial_frequency)
            if self.start_size:
                self.lora_B.normal_(std=self.start_size / math.sqrt(self.rank))
                self.keep_start()
            elif self.update.f.flat_at_zero:  # B = 0 would never train
                self.lora_B.normal_(std=FLAT_START / math.sqrt(self.rank))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The frequency if it is learned."""
        return [self.frequency] if self.update.learns_frequency else []  # type: ignore[list-item]

    def current_frequency(self, dtype: torch.dtype) -> Tensor:
        """w, a scalar tensor."""
        if self.update.calibrated:
            return calibrated_frequency(self.lora_B, self.lora_A).to(dtype)
        return self.frequency.to(dtype)

    def start_frequency(self, dtype: torch.dtype) -> Tensor:
        """w at the start, a scalar tensor; for `start_size` only."""
        if self.update.calibrated:
            return calibrated_frequency(self.start_B, self.start_A).to(dtype)
        return torch.full((), self.initial_frequency, dtype=dtype, device=self.start_A.device)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s f(B A), or s f(B A) - s f(B0 A0) with `start_size`, (out, in)."""
        update = self.update.value(self.product(dtype), self.current_frequency(dtype))
        if self.start_size:
            start = self.start_B.to(dtype) @ self.start_A.to(dtype)
            update = update - self.update.value(start, self.start_frequency(dtype))
        return update

    def forward(self, x: Tensor) -> Tensor:
        if (y := self.again(x)) is not None:
            return y
        if not self.in_effect:
            return self.unadapted(x)
        if self.can_stream(x):
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

    def can_stream(self, x: Tensor) -> bool:
        """Whether `streamed` may replace the formula.

        False for a convolution, whose weight is small compared to its input, under the transforms of torch.func,
        which need plain operations, for a nested tensor, and where the base has a `forward` of its own.
        """
        plain = not isinstance(self.layer, ConvolutionLayer) and not transformed() and not x.is_nested
        return plain and not self.calls_base

    def streamed(self, x: Tensor) -> Tensor:
        """(W0 + s f(B A)) x + bias with the weight formed block by block, and again in the backward pass.

        In eval mode without gradients the formed weight is kept.
        """
        given, x = x.dtype, x.to(self._compute_dtype(x))
        separate = self.dropout > 0 and self.training  # dropout must not act on the path through W0
        weight, bias = (None, None) if separate else (self.base.weight, self.base.bias)
        formed = None if separate else self._cached_weight(x.dtype)
        if formed is not None and not torch.is_grad_enabled():
            plain = x.dtype == given and is_short(x, formed) and self.can_fuse(x)
            if plain and (y := self._keep_short(x, ShortCall(self, formed))) is not None:
                return y
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
            self.current_frequency(wide),
            self.update,
            self._to_matrix,
            formed,
        )
        if separate:
            y = self.base(x) + y
        return y.to(given) if self.layer.keeps_dtype else y

    def _to_matrix(self, weight: Tensor | None) -> Tensor | None:
        """W0 (out, in), or W0 - s f(B0 A0) with `start_size`, for the parameter that holds W0; None is zero."""
        matrix = None if weight is None else self.layer.matrix(self.base, weight)
        if not self.start_size:
            return matrix
        wide = torch.promote_types(self.layer.dtype(self.base), torch.float32)
        minus = replace(self.update, scaling=-self.scaling)
        a, b = self.start_A.to(wide), self.start_B.to(wide)
        return merged_weight(matrix, a, b, self.start_frequency(wide), minus, wide)

    def _cached_weight(self, dtype: torch.dtype) -> Tensor | None:
        """W0 + s f(B A) in `dtype`, computed once; None if it must not be kept."""
        if not self.may_cache():
            return None
        sources = [self.base.weight, *self.adapter_parameters().values(), *self.adapter_buffers().values()]
        return self._formed_weight.get(sources, lambda: self._form_weight(dtype), key=dtype)

    def _form_weight(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(self.lora_A):
            a, b, frequency = self.lora_A.to(wide), self.lora_B.to(wide), self.current_frequency(wide)
            return merged_weight(self._to_matrix(self.base.weight), a, b, frequency, self.update, dtype)

    def low_rank_update(self) -> LowRankUpdate:
        """s B A, or what has changed of it with `start_size`: s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]."""
        if not self.start_size:
            return super().low_rank_update()
        a, b = self.lora_A.detach(), self.lora_B.detach()
        a0, b0 = self.start_A.to(a), self.start_B.to(b)
        return LowRankUpdate(torch.cat([b - b0, b0], 1), torch.cat([a, a - a0]), self.scaling)

    @torch.no_grad()
    def update_size(self) -> tuple[float, float]:
        """||dW||_F for the whole update dW, and ||f(B A) - B A||_F / ||B A||_F, from the whole product."""
        product = self.product(torch.float32)
        update = self.update.value(product, self.current_frequency(torch.float32))
        residual = (update / self.scaling - product).norm() / product.norm().clamp_min(torch.finfo(torch.float32).tiny)
        size = self.delta_weight().norm() if self.start_size else update.norm()
        return size.item(), residual.item()

    def phase(self) -> float:
        """|w| rms(B A), the size of the argument of f, in radians; 1 if w is calibrated and B is not 0."""
        return (rms_of_product(self.lora_B, self.lora_A) * self.current_frequency(torch.float64).abs()).item()

    @torch.no_grad()
    def nonlinear_share(self) -> float:
        """||f - c B A||_F / ||f||_F for f = f(B A) - f(0) and the best number c, in float64 on a sample of rows.

        Between 0 and 1: the share of the update that LoRA with another factor s cannot give. 0 where B A is 0.
        """
        rows = regular_sample(torch.arange(len(self.lora_B), device=self.lora_B.device), _SAMPLE)
        z = self.lora_B[rows].double() @ self.lora_A.double()
        f = replace(self.update, centered=True).value(z, self.current_frequency(torch.float64))
        if not z.any() or not f.any():
            return 0.0
        c = (f * z).sum() / z.square().sum()
        return ((f - c * z).norm() / f.norm()).item()

    def nearly_linear(self, dtype: torch.dtype | None = None) -> str:
        """As for every adapter; see `Describing.nearly_linear`."""
        if self.update.is_linear or not bool(self.lora_B.any()):
            return ""
        if dtype is None:
            dtype = autocast_dtype(self.lora_A) or self.layer.dtype(self.base)
        share, rounding = self.nonlinear_share(), torch.finfo(dtype).eps / 2
        if share < rounding:
            name = str(dtype).removeprefix("torch.")
            return f"all but {share:.1e} of f(BA) is a multiple of BA, and {name} resolves {rounding:.1e}"
        if self.update.f.periodic and (phase := self.phase()) < _LEAST_PHASE:
            return f"w rms(BA) is {phase:.1e}, where f is almost linear; it should be about 1"
        return ""

    def statistics(self) -> dict[str, float]:
        """Size and nonlinearity of the update.

        Returns:
            relative_norm: ||s f(B A)||_F / ||W0||_F; nonlinearity: ||f(B A) - B A||_F / ||B A||_F; nonlinear_share;
            phase, where f depends on a frequency; frequency, where it changes.
        """
        size, residual = self.update_size()
        statistics = {
            "relative_norm": size / self.base_norm(),
            "nonlinearity": residual,
            "nonlinear_share": self.nonlinear_share(),
        }
        if self.update.f.periodic:
            statistics["phase"] = self.phase()
        if self.update.calibrated or self.update.learns_frequency:
            statistics["frequency"] = self.current_frequency(torch.float64).item()
        return statistics

    @torch.no_grad()
    def summary(self) -> AdapterSummary:
        """The norm of s f(B A), and the spectrum of s B A."""
        change, residual = self.update_size()
        note = f"|f(BA) - BA| / |BA| = {residual:.1e}"
        if self.update.f.periodic:
            note += f", w rms(BA) = {self.phase():.1e}"
        return replace(super().summary(), change=change, note=note)

    def charts(self) -> dict[str, str]:
        """As for any low-rank pair, and how far f(B A) is from linear."""
        title = "AFA, LoRAN: distance from linear, each layer"
        charts = {title: each_layer("nonlinearity")}
        if self.update.f.periodic:
            charts["LoRAN: w rms(BA), each layer"] = each_layer("phase")
        return charts | super().charts()


class LoRANExperts(ExpertsAdapter):
    """W'_e = W_e + s f(B_e A_e), or with a start W_e + s f(B_e A_e) - s f(B0_e A0_e)."""

    method = "loran"

    def __init__(self, base: nn.Module, qualified_name: str, config: LoRAN, stacks: Sequence[str]) -> None:
        super().__init__(base, qualified_name, config, stacks)
        self.config = config
        self._updates: dict[str, WeightUpdate] = {}
        calibrated = config.frequency == "calibrate"
        for stack in stacks:
            a, b = self.pair(stack)
            if config.divide_by_root:
                self.scaling[stack] /= math.sqrt(a.shape[2])
            update = WeightUpdate(config.function, self.scaling[stack], config.amplitude, config.centered, calibrated)
            self._updates[stack] = update
            if not calibrated:
                add = self.add_parameter if update.learns_frequency else self.add_buffer
                add(f"{stack}_frequency", torch.empty(len(a), device=a.device))
            if config.start_size:
                self.add_buffer(f"{stack}_start_A", torch.empty_like(a))
                self.add_buffer(f"{stack}_start_B", torch.empty_like(b))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As for `LoRANAdapter`."""
        super().reset_parameters()
        config = self.config
        for stack, update in self._updates.items():
            a, b = self.pair(stack)
            if not update.calibrated:
                getattr(self, f"{stack}_frequency").fill_(config.frequency)
            if config.start_size:
                b.normal_(std=config.start_size / math.sqrt(a.shape[1]))
                self.get_buffer(f"{stack}_start_A").copy_(a)
                self.get_buffer(f"{stack}_start_B").copy_(b)
            elif update.f.flat_at_zero:
                b.normal_(std=FLAT_START / math.sqrt(a.shape[1]))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The frequencies if they are learned."""
        return [p for name, p in self.adapter_parameters().items() if name.endswith("_frequency")]

    def _value(self, stack: str, b: Tensor, a: Tensor, frequency: Tensor | None) -> Tensor:
        update, dtype = self._updates[stack], b.dtype
        w = torch.vmap(calibrated_frequency)(b, a) if frequency is None else frequency
        return update.value(b @ a, w.to(dtype)[:, None, None])

    def adapted(self, stack: str, dtype: torch.dtype) -> Tensor:
        a, b = (t.to(dtype) for t in self.pair(stack))
        update = self._value(stack, b, a, getattr(self, f"{stack}_frequency", None))
        if self.config.start_size:
            a, b = (self.get_buffer(f"{stack}_start_{part}").to(dtype) for part in "AB")
            frequency = self.config.frequency
            first = None if isinstance(frequency, str) else torch.full_like(b[:, 0, 0], frequency)
            update = update - self._value(stack, b, a, first)
        return self.matrices(stack).to(dtype) + update
