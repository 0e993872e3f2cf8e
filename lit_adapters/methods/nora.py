"""NoRA: learnable group-wise rational functions in the place of fixed activations (arXiv 2509.13240).

    h ── act (frozen) ──►            becomes         h ── R(h; a, b) ──►     (or act(h) + R(h; a, b) - R(h; a0, b0))

    R(x; a, b) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   degrees (m, n) = (5, 4), one function for each of G groups
    a = a0 + c (alpha/r) (B_num A_num) sigma_num         B (G, r) zero, A (r, m+1), (r, n) Kaiming-uniform(sqrt 5)
    b = b0 + c (alpha/r) (B_den A_den) sigma_den

a0, b0 fit the pretrained activation and are frozen. scaling="none" is the published method: c sigma = 1. scaling=
"density" (ours) divides each direction by what it does to the function on the layer's own inputs x:
sigma_num,i = 1 / rms(x^i / Q), sigma_den,j = 1 / rms(x^j P / Q^2), so that a step of the optimiser moves the function
by the same amount along every coefficient; c = `scale`. base="anchored" (ours) keeps act itself and adds the change
of R alone: the start is the pretrained model bit for bit.

Parameters an activation: r (2G + m + 1 + n), 78 at the defaults; G (m + 1 + n) = 80 with rank=None, which trains the
coefficients directly (without alpha/r). Trained as a function it is not mergeable into weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lit_adapters.activations import RationalActivation, fit_for, is_known_activation
from lit_adapters.errors import AdapterError
from lit_adapters.layout import channel_layout
from lit_adapters.methods.base import AdapterModule, Method
from lit_adapters.ops import Denominator, rational
from lit_adapters.ops.rational import MAX_DEGREE
from lit_adapters.statistics import drift

_PRESET_RANGE = (-6.0, 6.0)
_GRID = 256  # points on which functions and densities are kept
_ASSUMED_STD = 2.0  # of pre-activations before any were seen; normal with mean 0


@dataclass
class NoRA(Method):
    """Configuration of NoRA.

    Args:
        groups: G, the number of functions a layer; must divide the layer's channels.
        rank: r of the coefficient updates; None trains the coefficients directly.
        alpha: the updates are multiplied by alpha / rank.
        degrees: (m, n) of numerator and denominator.
        denominator: "abs-of-sum" (the paper's text) or "sum-of-abs" (the released kernels).
        base: "rational" replaces the activation by its fit, "anchored" keeps it and adds the change of the fit.
        fit_range: interval of the fit, or "calibrate" to fit on the range that `lit_adapters.calibrate` measures.
        scaling: "density" normalises updates by their effect on the function, "none" is the published method.
        scale: c, the common factor of density-normalised updates.
        targets: "activations" (those of the MLPs), a list of name suffixes, or a regular expression for whole names.
        exclude: name suffixes of modules to leave alone.
        channel_dim: dimension that holds the channels; "auto" takes 1 after convolutions, -1 after linear layers.

    Raises:
        AdapterError: a value is out of range.
    """

    name: ClassVar[str] = "nora"
    kind: ClassVar[str] = "activation"

    groups: int = 8
    rank: int | None = 3
    alpha: float = 6.0
    degrees: tuple[int, int] = (5, 4)
    denominator: Denominator = "abs-of-sum"
    base: Literal["rational", "anchored"] = "rational"
    fit_range: tuple[float, float] | Literal["calibrate"] = _PRESET_RANGE
    scaling: Literal["density", "none"] = "density"
    scale: float = 0.3
    targets: str | Sequence[str] = "activations"
    exclude: Sequence[str] = ()
    channel_dim: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self.degrees = (int(self.degrees[0]), int(self.degrees[1]))
        if not isinstance(self.fit_range, str):
            self.fit_range = (float(self.fit_range[0]), float(self.fit_range[1]))
        if self.groups < 1:
            raise AdapterError(f"groups {self.groups} must be at least 1")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank} must be at least 1, or None to train coefficients directly")
        if not all(1 <= d <= MAX_DEGREE for d in self.degrees):
            raise AdapterError(f"degrees {self.degrees} must lie between 1 and {MAX_DEGREE}")
        choices = {
            "denominator": get_args(Denominator),
            "base": ("rational", "anchored"),
            "scaling": ("density", "none"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise AdapterError(f"{field} {getattr(self, field)!r} must be one of {', '.join(map(repr, allowed))}")
        if self.fit_range != "calibrate" and not self.fit_range[0] < self.fit_range[1]:
            raise AdapterError(f"fit_range {self.fit_range!r} must be an interval (low, high) or 'calibrate'")
        if self.scale <= 0:
            raise AdapterError(f"scale {self.scale} must be positive")

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        if not is_known_activation(base):
            raise AdapterError(
                f"NoRA adapts pointwise activations; {qualified_name!r} is a {type(base).__name__}. "
                f"Leave it out with exclude=[{qualified_name!r}]"
            )
        layout = channel_layout(parent, base)
        channel_dim = layout.channel_dim if self.channel_dim == "auto" else self.channel_dim
        if channel_dim is None:
            raise AdapterError(
                f"cannot tell which dimension of the input of {qualified_name!r} holds the channels ({layout.reason}); "
                "set channel_dim to 1 (after convolutions) or -1 (after linear layers)"
            )
        if layout.channels is not None and layout.channels % self.groups:
            raise AdapterError(
                f"{self.groups} groups do not divide the {layout.channels} channels of {qualified_name!r}; "
                f"choose groups among the divisors of {layout.channels}"
            )
        device = next((t.device for t in (*parent.parameters(), *parent.buffers())), torch.device("cpu"))
        return NoRAActivation(base, self, channel_dim, device)


class NoRAActivation(AdapterModule):
    """One adapted activation: (..., D, ...) -> the same shape and dtype."""

    method = "nora"
    decays = False

    def __init__(self, base: nn.Module, config: NoRA, channel_dim: int, device: torch.device) -> None:
        super().__init__(base)
        self.config, self.channel_dim = config, channel_dim
        # An in-place activation would overwrite the input that backward needs.
        self._inplace = getattr(base, "inplace", False)
        if self._inplace:
            base.inplace = False
        m, n = config.degrees
        for part, width in (("numerator", m + 1), ("denominator", n)):
            self.add_buffer(f"base_{part}", torch.zeros(width, device=device))
            self.add_buffer(f"{part}_scale", torch.ones(width, device=device))
            if config.rank is None:
                self.add_parameter(f"{part}_delta", torch.empty(config.groups, width, device=device))
            else:
                self.add_parameter(f"{part}_A", torch.empty(config.rank, width, device=device))
                self.add_parameter(f"{part}_B", torch.empty(config.groups, config.rank, device=device))
        self.add_buffer("fit_range", torch.zeros(2, device=device))
        self.add_buffer("grid_range", torch.zeros(2, device=device))
        self.add_buffer("density", torch.zeros(_GRID, device=device))
        self.add_buffer("calibrated", torch.tensor(False, device=device))
        self._awaits_calibration = config.fit_range == "calibrate"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B (or the direct update) zero; inputs assumed normal until calibrated."""
        for name, parameter in self.adapter_parameters().items():
            if name.endswith("_A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                nn.init.zeros_(parameter)
        self._assume_normal_inputs()

    def _assume_normal_inputs(self) -> None:
        spread = 5 * _ASSUMED_STD
        x = torch.linspace(-spread, spread, 2001, dtype=torch.float64)
        interval = _PRESET_RANGE if isinstance(self.config.fit_range, str) else self.config.fit_range
        self._fit(interval, x, torch.exp(-0.5 * (x / _ASSUMED_STD) ** 2), (-spread, spread), None)

    @property
    def awaits_calibration(self) -> bool:
        return self._awaits_calibration

    def calibrate(self, values: Tensor) -> None:
        """Take the density of the inputs, and with fit_range="calibrate" their range, from a sample (N,).

        Raises:
            AdapterError: the coefficients have already moved, or the sample holds values that are not finite.
        """
        moved = [n for n, p in self.adapter_parameters().items() if not n.endswith("_A") and p.detach().any()]
        if moved:
            raise AdapterError(
                f"{self.qualified_name!r} has been trained ({moved[0]} is not zero): calibrating now would change its "
                "function. Calibrate once, right after attach"
            )
        values = values.detach().double().flatten().cpu()
        if not torch.isfinite(values).all() or len(values) < 2:
            raise AdapterError(f"the inputs seen by {self.qualified_name!r} are empty or not finite")
        low, high = torch.quantile(values[:: max(1, len(values) // 1_000_000)], torch.tensor([5e-4, 1 - 5e-4]).double())
        span = (low.item(), max(high.item(), low.item() + 1e-3))
        histogram = torch.histc(values, bins=_GRID, min=span[0], max=span[1])
        adaptive = isinstance(self.config.fit_range, str)
        interval = span if adaptive else self.config.fit_range
        self._fit(interval, values, torch.ones_like(values), span, histogram if adaptive else None, histogram)
        self.calibrated.fill_(True)
        self._awaits_calibration = False

    def _fit(
        self,
        interval: tuple[float, float],
        x: Tensor,
        weights: Tensor,
        grid_range: tuple[float, float],
        fit_density: Tensor | None,
        density: Tensor | None = None,
    ) -> None:
        """Set the base coefficients for `interval`, and the scales for inputs x (N,) with `weights` (N,)."""
        config = self.config
        fit = fit_for(self.base_copy(), interval, config.degrees, config.denominator, density=fit_density)
        a, b = torch.tensor(fit.numerator).double(), torch.tensor(fit.denominator).double()
        grid = torch.linspace(*grid_range, _GRID, dtype=torch.float64)
        if density is None:
            density = torch.exp(-0.5 * (grid / _ASSUMED_STD) ** 2)
        with torch.no_grad():
            self.base_numerator.copy_(a)
            self.base_denominator.copy_(b)
            self.fit_range.copy_(torch.tensor(interval))
            self.grid_range.copy_(torch.tensor(grid_range))
            self.density.copy_(density / density.sum())
            if config.scaling == "density":
                effect_a, effect_b = _effects(x, weights, a, b, config.denominator)
                self.numerator_scale.copy_(config.scale / effect_a)
                self.denominator_scale.copy_(config.scale / effect_b)

    def _update(self, part: str) -> Tensor:
        config = self.config
        if config.rank is None:
            update = self._parameters[f"{part}_delta"]
        else:
            # Written as a product and a sum, which autocast leaves in float32; the factors are tiny.
            b, a = self._parameters[f"{part}_B"], self._parameters[f"{part}_A"]
            update = (b.unsqueeze(-1) * a).sum(1) * (config.alpha / config.rank)  # type: ignore[union-attr]
        return update * self._buffers[f"{part}_scale"]  # type: ignore[operator]

    def base_coefficients(self) -> tuple[Tensor, Tensor]:
        """The frozen fit of the pretrained activation, repeated for every group: (G, m+1) and (G, n)."""
        groups = self.config.groups
        return self.base_numerator.expand(groups, -1), self.base_denominator.expand(groups, -1)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The effective numerator (G, m+1) and denominator (G, n), float32 and differentiable."""
        a, b = self.base_coefficients()
        return a + self._update("numerator"), b + self._update("denominator")

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if self.training and self._awaits_calibration:
            raise AdapterError(
                f"{self.qualified_name!r} has fit_range='calibrate' and was not calibrated; call "
                "lit_adapters.calibrate(model, batches) before training, or train with AdapterCallback, which does"
            )
        if x.shape[self.channel_dim] % self.config.groups:
            raise AdapterError(
                f"{self.config.groups} groups do not divide the {x.shape[self.channel_dim]} channels of "
                f"{self.qualified_name!r} (input {tuple(x.shape)}, channel_dim {self.channel_dim})"
            )
        a, b = self.coefficients()
        form = self.config.denominator
        if self.config.base == "rational":
            return rational(x, a, b, form, self.channel_dim)
        change = rational(x, a, b, form, self.channel_dim, base=self.base_coefficients())
        y: Tensor = self.base(x)
        return y + change.to(y.dtype)

    def functions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Grid (D,), the pretrained activation on it (D,), and the G current functions (G, D), float64 on the CPU."""
        low, high = self.grid_range.tolist()
        grid = torch.linspace(low, high, _GRID, dtype=torch.float64)
        a, b = (c.detach().double().cpu() for c in self.coefficients())
        form = self.config.denominator
        columns = grid[:, None].expand(-1, self.config.groups)
        with torch.no_grad():
            initial = self.base(grid)
            current = rational(columns, a, b, form)
            if self.config.base == "anchored":
                base = tuple(c.detach().double().cpu() for c in self.base_coefficients())
                current = initial[:, None] + current - rational(columns, *base, form)
        return grid, initial, current.T

    def statistics(self) -> dict[str, float]:
        """Drift of the functions from the pretrained activation, the largest over the groups, density-weighted."""
        _, initial, current = self.functions()
        moved = drift(current, initial, self.density.double().cpu())
        return {
            "drift": moved.l2.max().item(),
            "relative_drift": moved.relative.max().item(),
            "sup_drift": moved.sup.max().item(),
        }

    def folded(self) -> RationalActivation:
        """The same function with plain coefficients: no factors, no configuration."""
        anchored = self.config.base == "anchored"
        with torch.no_grad():
            a, b = self.coefficients()
            activation = RationalActivation(
                a,
                b,
                self.config.denominator,
                self.channel_dim,
                anchor=self.base_copy() if anchored else None,
                base=self.base_coefficients() if anchored else None,
            )
        return activation.requires_grad_(False).train(self.training)

    def unwrapped(self) -> nn.Module:
        base = super().unwrapped()
        if self._inplace:
            base.inplace = True
        return base

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        if self._awaits_calibration and not self.calibrated.is_meta:
            self._awaits_calibration = not bool(self.calibrated)

    def extra_repr(self) -> str:
        c = self.config
        return f"{type(self.base).__name__}, groups={c.groups}, rank={c.rank}, degrees={c.degrees}, base={c.base}"


def _effects(x: Tensor, weights: Tensor, a: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """rms over the inputs of what a unit of each coefficient adds: x^i / Q for a_i, x^j P / Q^2 for b_j."""
    weights = weights / weights.sum()
    p = sum(c * x**i for i, c in enumerate(a))
    terms = [c * x ** (j + 1) for j, c in enumerate(b)]
    q = 1 + (sum(terms).abs() if form == "abs-of-sum" else sum(t.abs() for t in terms))

    def rms(values: Tensor) -> Tensor:
        return (weights * values.square()).sum().sqrt().clamp_min(1e-12)

    numerator = torch.stack([rms(x**i / q) for i in range(len(a))])
    denominator = torch.stack([rms(x ** (j + 1) * p / q**2) for j in range(len(b))])
    return numerator, denominator
