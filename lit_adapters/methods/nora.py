"""NoRA: learned group-wise rational functions in place of fixed activations (arXiv 2509.13240).

    h ── act (frozen) ──►            becomes         h ── R(h; a, b) ──►     (or act(h) + R(h; a, b) - R(h; a0, b0))

    R(x; a, b) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   degrees (m, n) = (5, 4), one function for each of G groups
    a = a0 + c (alpha/r) (B_num A_num) sigma_num         B (G, r) zero, A (r, m+1), (r, n) Kaiming-uniform(sqrt 5)
    b = b0 + c (alpha/r) (B_den A_den) sigma_den

a0, b0 fit the pretrained activation and are frozen. scaling="none" is the published method: c sigma = 1. scaling=
"density" (ours) divides each direction by what it does to the function on the layer's own inputs x:
sigma_num,i = 1 / rms(x^i / Q), sigma_den,j = 1 / rms(x^j P / Q^2), so that a unit of each coefficient's update moves
the function equally; c = `scale`. (Under Adam a coefficient moves by about the learning rate a step, whatever its
effect, and a unit of a5 moves the function by x^5 / Q, 2,500 where |x| reaches 10.) base="anchored" (ours) keeps act
itself and adds only the change of R: the start is the pretrained model bit for bit.

Parameters for each activation: r (2G + m + 1 + n), 78 by default; G (m + 1 + n) = 80 with rank=None, which trains the
coefficients directly (without alpha/r). A function of the activations cannot be merged into weights.

Q is 1 + |b_1 x + ... + b_n x^n| ("abs-of-sum") in the paper. The released kernels compute 1 + |b_1 x| + ... + |b_n x^n|
("sum-of-abs"), with coefficients of GELU that were fitted for the other form. Here each form has its own fit, and a
preset knows its form, its interval and its largest error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lit_adapters.activations import RationalActivation, fit_for
from lit_adapters.activations.coefficients import PARTS, normal_inputs, set_base, set_scale
from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.activation_adapter import ASSUMED_STD, LEAST_SPREAD, SAMPLE, ActivationAdapter
from lit_adapters.methods.activation_method import ActivationMethod
from lit_adapters.methods.description import AdapterSummary, each_layer
from lit_adapters.methods.hooks import move_hooks
from lit_adapters.ops import Denominator, fixed_rational, rational
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.rational import MAX_DEGREE
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.values import LARGEST, check_choice, check_factor, check_number, check_whole

PRESET_RANGE = (-6.0, 6.0)
_FARTHEST = 1e4  # end of a range that a function can be fitted on
_MOST_RANK = 1 << 10  # a coefficient update has at most MAX_DEGREE + 1 columns


@dataclass
class NoRA(ActivationMethod):
    """Configuration of NoRA.

    Args:
        groups: G, the number of functions for each layer; must divide the layer's channels. "channels" gives each
            channel its own function.
        rank: r, the rank of the coefficient updates; None trains the coefficients directly.
        alpha: The updates are multiplied by alpha / rank.
        degrees: The degrees (m, n) of numerator and denominator.
        denominator: "abs-of-sum" (the paper's text) or "sum-of-abs" (the released kernels).
        base: "rational" replaces the activation by its fit, "anchored" keeps it and adds the change of the fit.
        fit_range: The interval of the fit, or "calibrate" to fit on the range that `lit_adapters.calibrate` measures.
        scaling: "density" normalises updates by their effect on the function, "none" is the published method.
        scale: c, the common factor of density-normalised updates.
        targets: "activations" (those of the MLPs), a list of name suffixes, or a regular expression for whole names.
        exclude: Name suffixes of modules to leave alone.
        channel_dim: The dimension that holds the channels; "auto" takes that of the layers around it.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "nora"
    one_row_a_group: ClassVar[tuple[str, ...]] = ("numerator_B", "numerator_delta")

    groups: int | Literal["channels"] = 8
    rank: int | None = 3
    alpha: float = 6.0
    degrees: tuple[int, int] = (5, 4)
    denominator: Denominator = "abs-of-sum"
    base: Literal["rational", "anchored"] = "rational"
    fit_range: tuple[float, float] | Literal["calibrate"] = PRESET_RANGE
    scaling: Literal["density", "none"] = "density"
    scale: float = 0.3
    targets: str | Sequence[str] = "activations"
    exclude: Sequence[str] = ()
    channel_dim: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self.normalise_targets()
        self.degrees = _degrees(self.degrees)
        if self.fit_range != "calibrate":
            self.fit_range = _interval(self.fit_range)
        self.check_groups()
        if self.rank is not None:
            check_whole("rank", self.rank, 1, _MOST_RANK, "or None to train the coefficients directly")
        check_factor("alpha", self.alpha)
        choices = {
            "denominator": get_args(Denominator),
            "base": ("rational", "anchored"),
            "scaling": ("density", "none"),
        }
        for field, allowed in choices.items():
            check_choice(field, getattr(self, field), allowed)
        check_number("scale", self.scale, low=1 / LARGEST)

    def adapter(
        self, base: nn.Module, qualified_name: str, groups: int, channel_dim: int, device: torch.device
    ) -> NoRAActivation:
        return NoRAActivation(base, qualified_name, self, groups, channel_dim, device)


def _interval(ends: Any) -> tuple[float, float]:
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise AdapterError(f"fit_range {shown(ends)} must be an interval (low, high) or 'calibrate'")
    for end in ends:
        check_number("fit_range: the end", end, -_FARTHEST, _FARTHEST)
    if not ends[1] - ends[0] >= LEAST_SPREAD:
        raise AdapterError(
            f"fit_range {tuple(ends)} must be an interval (low, high), {LEAST_SPREAD} wide or more, or 'calibrate'"
        )
    return float(ends[0]), float(ends[1])


def _degrees(degrees: Any) -> tuple[int, int]:
    valid = isinstance(degrees, (list, tuple)) and len(degrees) == 2
    if not valid or not all(type(d) is int and 1 <= d <= MAX_DEGREE for d in degrees):
        raise AdapterError(
            f"degrees {shown(degrees)} must be two whole numbers between 1 and {MAX_DEGREE}, as in (5, 4)"
        )
    return degrees[0], degrees[1]


class NoRAActivation(ActivationAdapter):
    """One adapted activation: (..., C, ...) with C channels -> the same shape and dtype."""

    method = "nora"
    base_numerator: Tensor
    base_denominator: Tensor
    numerator_scale: Tensor
    denominator_scale: Tensor
    fit_range: Tensor

    def __init__(
        self,
        base: nn.Module,
        qualified_name: str,
        config: NoRA,
        groups: int,
        channel_dim: int,
        device: torch.device,
    ) -> None:
        super().__init__(base, qualified_name, groups, channel_dim)
        self.config = config
        self._function: Cache[Callable[[Tensor], Tensor]] = Cache()  # R with the present coefficients
        m, n = config.degrees
        for part, width in zip(PARTS, (m + 1, n), strict=True):
            self.add_buffer(f"base_{part}", torch.zeros(width, device=device))
            self.add_buffer(f"{part}_scale", torch.ones(width, device=device))
            if config.rank is None:
                self.add_parameter(f"{part}_delta", torch.empty(groups, width, device=device))
            else:
                self.add_parameter(f"{part}_A", torch.empty(config.rank, width, device=device))
                self.add_parameter(f"{part}_B", torch.empty(groups, config.rank, device=device))
        self.add_buffer("fit_range", torch.zeros(2, device=device))
        self.add_density_buffers(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B (or the direct update) zero; inputs are taken for normal until calibration."""
        for name, parameter in self.adapter_parameters().items():
            if name.endswith("_A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                nn.init.zeros_(parameter)
        x, weights = normal_inputs(ASSUMED_STD)
        interval = PRESET_RANGE if isinstance(self.config.fit_range, str) else self.config.fit_range
        self._fit(interval, x, weights, (x[0].item(), x[-1].item()), None)
        with torch.no_grad():
            self.calibrated.fill_(0)
        self._awaits_calibration = self.config.fit_range == "calibrate"

    @property
    def awaits_calibration(self) -> bool:
        return self._awaits_calibration

    def calibrate(self, values: Tensor) -> None:
        """Measure the density of the inputs, and with fit_range="calibrate" their range, on a sample (N,).

        Raises:
            AdapterError: The coefficients have already moved, or the sample is empty, constant or not finite.
        """
        moved = [n for n, p in self.adapter_parameters().items() if not n.endswith("_A") and p.detach().any()]
        if moved:
            raise AdapterError(
                f"{self.qualified_name!r} has been trained ({moved[0]} is not zero): calibrating now would change its "
                "function. Calibrate once, right after attach"
            )
        values, span, histogram = self.measured(values)
        if isinstance(self.config.fit_range, str):
            self._fit(span, values, torch.ones_like(values), span, histogram, histogram)
        else:
            self._fit(self.config.fit_range, values, torch.ones_like(values), span, None, histogram)
        self.calibrated.fill_(1)
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
        self.stand_alone()
        config = self.config
        fit = fit_for(self.base_copy(), interval, config.degrees, config.denominator, density=fit_density)
        with torch.no_grad():
            self.fit_range.copy_(torch.tensor(interval, dtype=torch.float64, device="cpu"))
        self.set_density(grid_range, density)
        set_base((self.base_numerator, self.base_denominator), fit)
        if config.scaling == "density":
            set_scale((self.numerator_scale, self.denominator_scale), config.scale, fit, x, weights)
        self.clear_caches()

    def _update(self, part: str) -> Tensor:
        """The update of each group's coefficients (G, k): (alpha/r) B A or the direct update, times the scale."""
        config = self.config
        if config.rank is None:
            update = getattr(self, f"{part}_delta")
        else:
            # Written as a product and a sum, which autocast leaves in float32; the factors are tiny.
            b, a = getattr(self, f"{part}_B"), getattr(self, f"{part}_A")
            update = (b.unsqueeze(-1) * a).sum(1) * (config.alpha / config.rank)
        scaled: Tensor = update * getattr(self, f"{part}_scale")
        return scaled

    def base_coefficients(self) -> tuple[Tensor, Tensor]:
        """The frozen fit of the pretrained activation, repeated for every group: (G, m+1) and (G, n)."""
        return self.base_numerator.expand(self.groups, -1), self.base_denominator.expand(self.groups, -1)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The effective numerator (G, m+1) and denominator (G, n), float32 and differentiable."""
        a, b = self.base_coefficients()
        return a + self._update("numerator"), b + self._update("denominator")

    def _subtracted(self) -> tuple[Tensor, Tensor] | None:
        return self.base_coefficients() if self.config.base == "anchored" else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        self._check_input(x)
        if self.may_cache():
            change = self._cached_function()(x)
        else:
            a, b = self.coefficients()
            # R(x; a, b), or with base="anchored" R(x; a, b) - R(x; a0, b0)
            change = rational(x, a, b, self.config.denominator, self.channel_dim, self._subtracted())
        if self.config.base == "rational":
            return change
        y: Tensor = self.base(x)  # act(x)
        return y + change.to(y.dtype)

    def _check_input(self, x: Tensor) -> None:
        """Check that the layer is calibrated if it has to be, and that the groups divide the channels of x.

        Raises:
            AdapterError: Calibration is missing while training, x has no such dimension, or the groups do not divide
                the channels.
        """
        if self.training and self._awaits_calibration:
            raise AdapterError(
                f"{self.qualified_name!r} has fit_range='calibrate' and was not calibrated; call "
                "lit_adapters.calibrate(model, batches) before training, or train with AdapterCallback, which does"
            )
        self.check_channels(x)

    def _cached_function(self) -> Callable[[Tensor], Tensor]:
        # Read from the table itself: looking attributes up takes longer than computing one token. Buffers need not be
        # sources: they change in calibration only, which clears the cache.
        return self._function.get([self._parameters[n] for n in self._adapter_parameters], self._fixed)  # type: ignore[misc]

    def _fixed(self) -> Callable[[Tensor], Tensor]:
        a, b = self.coefficients()
        return fixed_rational(a, b, self.config.denominator, self.channel_dim, self._subtracted())

    @torch.no_grad()
    def learned_change(self, x: Tensor, coefficients: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """R(x; a, b) - R(x; a0, b0) for every group (G, D), float64 on the CPU.

        This is what training changed, without the error of the initial fit; it is zero at the start.

        Args:
            x: The inputs (D,).
            coefficients: a (G, m+1) and b (G, n) of another moment; None for the present ones.
        """
        a, b = (c.double().cpu() for c in coefficients or self.coefficients())
        a0, b0 = (c.double().cpu() for c in self.base_coefficients())
        columns = x[:, None].expand(-1, self.groups)
        return rational(columns, a, b, self.config.denominator, base=(a0, b0)).T

    @torch.no_grad()
    def functions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Grid (D,), the pretrained activation on it (D,), and the G current functions (G, D), float64 on the CPU."""
        grid = self.grid()
        initial = self.base(grid)
        if self.config.base == "anchored":
            return grid, initial, initial + self.learned_change(grid)
        a, b = (c.double().cpu() for c in self.coefficients())
        columns = grid[:, None].expand(-1, self.groups)
        return grid, initial, rational(columns, a, b, self.config.denominator).T

    def singular_values(self) -> dict[str, Tensor]:
        """The singular values of the updates of numerator (G, m+1) and denominator (G, n), before scaling.

        With scaling="density" the unit is a coefficient's effect on the function, otherwise the coefficient itself.
        """
        with torch.no_grad():
            updates = {p: self._update(p) / getattr(self, f"{p}_scale") for p in PARTS}
        return {part: torch.linalg.svdvals(update.double().cpu()) for part, update in updates.items()}

    def observe(self, x: Tensor) -> dict[str, float]:
        """outside_range: the share of the inputs outside the interval of the fit."""
        values = regular_sample(x, SAMPLE)
        low, high = self.fit_range.tolist()
        return {"outside_range": ((values < low) | (values > high)).float().mean().item()}

    def folded(self) -> RationalActivation:
        """The same function as a module with plain coefficients, without factors and configuration."""
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
        move_hooks(self, activation)
        return activation.requires_grad_(False).train(self.training)

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        if self.config.fit_range == "calibrate" and not self.calibrated.is_meta:
            self._awaits_calibration = not bool(self.calibrated.item())

    def extra_repr(self) -> str:
        c = self.config
        return f"{type(self.base).__name__}, groups={self.groups}, rank={c.rank}, degrees={c.degrees}, base={c.base}"

    def fitted_range(self) -> tuple[float, float]:
        """The ends of the interval on which the rational function was fitted to the pretrained activation."""
        low, high = self.fit_range.tolist()
        return low, high

    def summary(self) -> AdapterSummary:
        """As for any learned functions, with their degrees and rank."""
        c = self.config
        rank = "" if c.rank is None else f", r = {c.rank}"
        return replace(super().summary(), size=f"{self.groups} groups, {c.degrees[0]}/{c.degrees[1]}{rank}")

    def merge_obstacle(self) -> str:
        """No parameter of the model holds a function."""
        return "a function of the activations: merging leaves a plain rational activation in its place"

    def charts(self) -> dict[str, str]:
        """The drift of the functions, and the share of inputs outside the interval of the fit."""
        return {
            "functions: drift from the pretrained ones, each layer": each_layer("relative_drift"),
            "functions: share of inputs outside the fit": each_layer("outside_range"),
        }
