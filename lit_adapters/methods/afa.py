"""AFA-LoRA: an activation between A and B, annealed to linear while training (arXiv 2512.22455).

    h = W0 x + s B phi_beta(A x)        phi_beta(z) = beta sigma(z) + (1 - beta) z        beta: 1 -> 0

At beta = 0 this is LoRA, and merges as LoRA does. B is zero at the start, so any sigma starts at the pretrained layer.
sigma is fixed, or "rational": a learned rational function for each group of channels of z = A x, which starts as a fit
of SiLU and is annealed to the identity like the others. r (in + out) parameters a layer; a learned sigma adds 10 for
each group.
"""

# No `from __future__ import annotations` here: jsonargparse would not resolve a dataclass's annotations, and would
# accept anything for a schedule.
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.activations import fit_for
from lit_adapters.activations.coefficients import PARTS, normal_inputs, set_base, set_scale
from lit_adapters.errors import AdapterError
from lit_adapters.methods.description import AdapterSummary, each_layer
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.weight_adapter import read_error
from lit_adapters.ops import rational
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.schedules import Linear, Schedule, to_schedule
from lit_adapters.values import check_choice, check_whole

SIGMAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "centered_sigmoid": lambda z: torch.sigmoid(z) - 0.5,
}
RATIONAL = "rational"
_RANGE = (-6.0, 6.0)  # the interval on which a learned sigma is fitted to SiLU
_ASSUMED_STD = 1.0  # of z = A x, where the updates of the coefficients are scaled; normal with mean 0
_PATIENCE = 100  # training steps without annealing before it counts as forgotten
_SAMPLE = 256  # inputs that `observe` takes
_SCALE = 0.3  # root mean square change of sigma by one unit of one coefficient, as in NoRA


@dataclass
class AFALoRA(LowRank):
    """Configuration of AFA-LoRA; rank to rslora are those of `LowRank`.

    Args:
        activation: The name of sigma: relu, silu or gelu, which the paper names; tanh, sigmoid, centered_sigmoid
            (sigmoid minus 1/2); or rational, which is learned.
        schedule: beta as a function of training progress. `lit_adapters.AdapterCallback` or
            `lit_adapters.set_progress` moves beta.
        groups: How many groups of channels of z have a function of their own; for activation="rational" only.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "afa"
    merges: ClassVar[str] = "at beta = 0"
    exports: ClassVar[str] = "at beta = 0"

    activation: str = "relu"
    schedule: Schedule = field(default_factory=Linear)
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule = to_schedule(self.schedule)
        check_choice("activation", self.activation, (*SIGMAS, RATIONAL))
        check_whole("groups", self.groups)
        if self.groups > 1 and self.activation != RATIONAL:
            raise AdapterError(f"groups {self.groups} must be exactly 1 unless activation is {RATIONAL!r}")

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> "AFAAdapter":
        return AFAAdapter(base, qualified_name, self)


class AFAAdapter(LowRankAdapter):
    """h = W0 x + s B phi_beta(A x) for one layer; (..., in) -> (..., out).

    Raises:
        AdapterError: As for every low-rank adapter, or the groups do not divide the rank.
    """

    method = "afa"
    has_branch = True
    needs_weight = False
    schedule: Schedule
    sigma_numerator: nn.Parameter
    sigma_denominator: nn.Parameter
    sigma_numerator_scale: Tensor
    sigma_denominator_scale: Tensor
    sigma_base_numerator: Tensor
    sigma_base_denominator: Tensor

    def __init__(self, base: nn.Module, qualified_name: str, config: AFALoRA) -> None:
        super().__init__(base, qualified_name, config)
        if self.rank % config.groups:
            raise AdapterError(f"{config.groups} groups do not divide the rank {self.rank}; choose a divisor")
        self.schedule = config.schedule
        self._is_linear: Cache[bool] = Cache()
        self.activation = config.activation
        device = self.lora_A.device
        # `add_buffer` would refuse a name that is a property.
        self._adapter_buffers.append("beta")
        self._buffers["beta"] = torch.empty((), dtype=torch.float32, device=device)
        if self.activation == RATIONAL:
            self.fit = fit_for(nn.SiLU(), _RANGE, (5, 4), "abs-of-sum")
            for part, width in zip(PARTS, (6, 4), strict=True):
                self.add_parameter(f"sigma_{part}", torch.empty(config.groups, width, device=device))
                self.add_buffer(f"sigma_{part}_scale", torch.empty(width, device=device))
                self.add_buffer(f"sigma_base_{part}", torch.empty(width, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and B as in LoRA, beta where the schedule begins, a learned sigma at its fit of SiLU."""
        super().reset_parameters()
        self.set_beta(self.schedule(0.0))
        self._idle_steps: int | None = 0  # steps trained before anything moved beta; None once it moved
        self._written = -1  # the version of B at the last check
        if self.activation == RATIONAL:
            nn.init.zeros_(self.sigma_numerator)
            nn.init.zeros_(self.sigma_denominator)
            set_base((self.sigma_base_numerator, self.sigma_base_denominator), self.fit)
            scale = self.sigma_numerator_scale, self.sigma_denominator_scale
            set_scale(scale, _SCALE, self.fit, *normal_inputs(_ASSUMED_STD))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The coefficients of a learned sigma."""
        return [p for name, p in self.adapter_parameters().items() if name.startswith("sigma")]

    @property
    def beta(self) -> Tensor:
        """The share of the activation, a scalar in [0, 1]; in an average of models that of the model itself."""
        if self._original is not None:
            self.restore_averaged()
        beta = self._buffers["beta"]
        assert beta is not None
        return beta

    def set_progress(self, progress: float) -> None:
        """Set beta to its value in the schedule at `progress` in [0, 1]."""
        self.set_beta(self.schedule(progress))

    @torch.no_grad()
    def set_beta(self, beta: float) -> None:
        """Set beta."""
        self.stand_alone()
        self.beta.fill_(beta)
        self._idle_steps = None

    def _require_annealing(self) -> None:
        """Count the training steps (writes to B) until something moves beta; does nothing in a compiled graph.

        Raises:
            AdapterError: Training has taken so many steps without annealing that it must have been forgotten.
        """
        if self._idle_steps is None or not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        if self.lora_B._version != self._written:
            self._idle_steps, self._written = self._idle_steps + 1, self.lora_B._version
        if self._idle_steps > _PATIENCE and self.beta.item() != self.schedule(1.0):
            raise AdapterError(
                f"{self.qualified_name!r} has trained for {_PATIENCE} steps and nothing moves its beta: train with "
                "AdapterCallback, or call lit_adapters.set_progress(model, step / steps) after every step"
            )

    def sigma(self, z: Tensor) -> Tensor:
        """sigma(z) for z = A x (..., r), or (N, r, ...) for a convolution."""
        if self.activation != RATIONAL:
            return SIGMAS[self.activation](z)
        a = self.sigma_base_numerator + self.sigma_numerator * self.sigma_numerator_scale
        b = self.sigma_base_denominator + self.sigma_denominator * self.sigma_denominator_scale
        return rational(z, a, b, "abs-of-sum", self.layer.channel_dim)

    def phi(self, z: Tensor) -> Tensor:
        """beta sigma(z) + (1 - beta) z; exactly z at beta = 0 and exactly sigma(z) at beta = 1."""
        beta = self.beta
        if torch.jit.is_tracing():  # the ONNX exporter fails on a bfloat16 tensor times a tensor without dimension
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            return (beta * self.sigma(wide) + (1 - beta) * wide).to(z.dtype)
        return beta * self.sigma(z) + (1 - beta) * z

    def forward(self, x: Tensor) -> Tensor:
        if (y := self.again(x)) is not None:
            return y
        if not self.in_effect:
            return self.unadapted(x)
        self._require_annealing()
        if self.can_fuse(x):
            if not self._is_known_to_be_linear():
                return self.fused(x, self.phi)
            return y if (y := self.short(x)) is not None else self.fused(x)
        y = self.base(x)  # W0 x + bias
        return y + self.branch(x).to(y.dtype)

    def _is_known_to_be_linear(self) -> bool:
        """Whether beta is 0 and its value can be kept."""
        beta = self.beta
        if not self.may_cache() or torch._C._len_torch_dispatch_stack() or beta.is_meta or beta.is_inference():
            return False
        return self._is_linear.get([beta], lambda: beta.item() == 0.0)

    def branch(self, x: Tensor) -> Tensor:
        """s B phi(A x); (..., in) -> (..., out)."""
        return self.scaling * self.up(self.phi(self.down(x)))

    def weight_to_read(self) -> Tensor:
        """As for any weight adapter, once it is linear.

        Raises:
            AdapterError: beta is not 0, so that no weight is equal to the adapter.
        """
        if self.beta.item() != 0.0:
            raise read_error(self.qualified_name, "activation")
        return super().weight_to_read()

    def product_obstacle(self) -> str:
        """As for every low-rank adapter: beta is above 0 for a part of the training."""
        return f"{self.qualified_name!r} (AFA-LoRA) has an activation between A and B while beta is above 0"

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A (out, in), which is the whole update at beta = 0.

        Raises:
            AdapterError: beta is not 0.
        """
        self.check_linear()
        return super().delta_weight(dtype)

    def check_linear(self) -> None:
        """Check that beta is exactly 0.

        Raises:
            AdapterError: beta is not 0.
        """
        beta = self.beta.item()
        if beta != 0.0:
            if self.schedule(1.0) == 0.0:
                fix = (
                    f"train until {self.schedule} reaches 0, or call lit_adapters.set_progress(model, 1.0) and accept "
                )
                fix += "that the function changes"
            else:
                fix = f"{self.schedule} never reaches 0: such a model stays nonlinear; use a schedule that ends at 0"
            raise AdapterError(
                f"{self.qualified_name!r} is nonlinear at beta = {beta:g}, and no weight is equal to it; {fix}"
            )

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, float]:
        """nonlinearity: ||phi_beta(z) - z|| / ||z|| for z = A x, over a regular sample of the rows of x."""
        if self.layer.channel_dim != -1:
            x = x[:1]
        else:
            x = x.reshape(-1, x.shape[-1])
            x = x[regular_sample(torch.arange(len(x), device=x.device), _SAMPLE)]
        z = self.layer.down(self.base, x, self.lora_A.to(x.dtype)).float()
        residual = self.phi(z) - z
        return {"nonlinearity": (residual.norm() / z.norm().clamp_min(torch.finfo(z.dtype).tiny)).item()}

    def statistics(self) -> dict[str, float]:
        """relative_norm of s B A, as in LoRA, and beta."""
        return super().statistics() | {"beta": self.beta.item()}

    def summary(self) -> AdapterSummary:
        """As for any low-rank pair, and beta."""
        return replace(super().summary(), note=f"beta {self.beta.item():g}")

    def charts(self) -> dict[str, str]:
        """As for any low-rank pair, and how far the activation is from linear."""
        title = "AFA, LoRAN: distance from linear, each layer"
        return {title: each_layer("nonlinearity")} | super().charts()
