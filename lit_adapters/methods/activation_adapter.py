"""What all adapters around an activation share: the copied activation, its hooks, and the density of its inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.activations.coefficients import normal_density
from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LearnedFunctions
from lit_adapters.methods.hooks import copy_hooks, move_hooks
from lit_adapters.ops._context import has_sizes
from lit_adapters.ops.statistics import drift, histogram, regular_sample, slope_bound

ASSUMED_STD = 2.0  # inputs are assumed normal, with mean 0 and this deviation, until they are measured
LEAST_SPREAD = 1e-3  # least width of the range of inputs; an error below
SAMPLE = 1 << 14  # inputs that `observe` and `input_histogram` take
_GRID = 256  # points on which functions and densities are kept
_MOST_MEASURED = 1_000_000  # inputs whose quantiles are computed


class ActivationAdapter(AdapterModule):
    """One adapted activation with G functions: (..., C, ...) with C channels -> the same shape and dtype.

    Subclasses call `add_density_buffers` where these buffers belong among their own, and implement `functions`,
    `coefficients` and `learned_change` of `LearnedFunctions`.

    Args:
        base: The activation.
        qualified_name: Its name in the model.
        groups: G, the number of functions.
        channel_dim: The dimension of the input that holds the channels.

    Attributes:
        grid_range: The ends of the range of inputs, (2,).
        density: The share of the inputs around each of the D points of `grid`, (D,).
        calibrated: Whether `density` was measured; a whole number, as averages of weights cannot subtract booleans.
            Files hold a boolean.
    """

    decays = False
    _has_handles = False  # whether the handles of the original's hooks act on the hooks here
    grid_range: Tensor
    density: Tensor
    calibrated: Tensor

    def __init__(self, base: nn.Module, qualified_name: str, groups: int, channel_dim: int) -> None:
        # A copy, because several layers may share one activation object.
        super().__init__(copy.copy(base), qualified_name)
        self.__dict__["original"] = base
        copy_hooks(nn.Module(), self.base)  # `adopt` takes those of the original
        if getattr(base, "inplace", False):  # it would overwrite the input that backward needs
            self.base.inplace = False
        self.groups = groups
        self.channel_dim = channel_dim

    # ---- the channels

    def check_channels(self, x: Tensor) -> None:
        """Check that x (..., C, ...) has channels, and that the groups divide their number C.

        Raises:
            AdapterError: x has no such dimension, or the groups do not divide the channels.
        """
        if has_sizes() and not -x.dim() <= self.channel_dim < x.dim():
            raise AdapterError(
                f"the input of {self.qualified_name!r} has the shape {tuple(x.shape)}, without a dimension "
                f"{self.channel_dim}; set another channel_dim"
            )
        if has_sizes() and x.shape[self.channel_dim] % self.groups:
            raise AdapterError(
                f"{self.groups} groups do not divide the {x.shape[self.channel_dim]} channels of "
                f"{self.qualified_name!r} (input {tuple(x.shape)}, channel_dim {self.channel_dim})"
            )

    # ---- the density of the inputs

    def add_density_buffers(self, device: torch.device) -> None:
        """Register `grid_range`, `density` and `calibrated`."""
        self.add_buffer("grid_range", torch.zeros(2, device=device))
        self.add_buffer("density", torch.zeros(_GRID, device=device))
        self.add_buffer("calibrated", torch.tensor(0, device=device))

    @torch.no_grad()
    def set_density(self, grid_range: tuple[float, float], counts: Tensor | None = None) -> None:
        """Keep how the inputs are distributed.

        Args:
            grid_range: The ends of their range.
            counts: How many lie in each of the D parts of this range, (D,) float64; None assumes a normal density.
        """
        grid = torch.linspace(*grid_range, _GRID, dtype=torch.float64, device="cpu")
        if counts is None:
            counts = normal_density(grid, ASSUMED_STD)
        self.grid_range.copy_(torch.tensor(grid_range, dtype=torch.float64, device="cpu"))
        self.density.copy_(counts / counts.sum())

    def measured(self, values: Tensor) -> tuple[Tensor, tuple[float, float], Tensor]:
        """Measure the range and the density of a sample of inputs.

        Args:
            values: The sample (N,).

        Returns:
            The sample in float64 on the CPU, the range that holds all but one in 1,000 of it, and how many values lie
            in each of the D parts of this range, (D,).

        Raises:
            AdapterError: The sample is empty, constant or not finite.
        """
        values = values.detach().double().flatten().cpu()
        if not torch.isfinite(values).all() or len(values) < 2:
            raise AdapterError(f"the inputs seen by {self.qualified_name!r} are empty or not finite; check the batches")
        sample = values[:: max(1, len(values) // _MOST_MEASURED)]
        span = (torch.quantile(sample, 5e-4).item(), torch.quantile(sample, 1 - 5e-4).item())
        if span[1] - span[0] < LEAST_SPREAD:
            raise AdapterError(
                f"the inputs seen by {self.qualified_name!r} are constant, {span[0]:g}, so that nothing can be "
                "measured on them. Give batches of real data, or exclude this layer"
            )
        return values, span, torch.histc(values, bins=_GRID, min=span[0], max=span[1])

    def grid(self) -> Tensor:
        """The points (D,) on which `density` is given, float64 on the CPU."""
        low, high = self.grid_range.tolist()
        return torch.linspace(low, high, _GRID, dtype=torch.float64, device="cpu")

    def input_histogram(self, x: Tensor) -> Tensor:
        """Counts (D + 2,) on the CPU for a regular sample of x: below the grid, in each of its D parts, above it."""
        low, high = self.grid_range.tolist()
        return histogram(regular_sample(x, SAMPLE), low, high, _GRID).cpu()

    # ---- what was learned

    def functions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Grid (D,), the pretrained activation on it (D,), and the G current functions (G, D), float64 on the CPU."""
        raise NotImplementedError

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The two tensors that the functions are computed from, float32 and differentiable."""
        raise NotImplementedError

    def learned_change(self, x: Tensor, coefficients: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What training added to each function at inputs x (D,): (G, D), float64 on the CPU; zero at the start.

        Args:
            x: The inputs.
            coefficients: Those of another moment; None for the present ones.
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, float]:
        """How far the functions are from the pretrained activation, for the group that differs most.

        drift, relative_drift and sup_drift are l2, relative and sup of `lit_adapters.ops.statistics.drift` under the
        layer's density. max_slope is max |phi'| on the grid, and relative_max_slope its ratio to the pretrained one's.
        """
        grid, initial, current = self.functions()
        moved = drift(current, initial, self.density.double().cpu())
        slope = slope_bound(current, grid).max()
        return {
            "drift": moved.l2.max().item(),
            "relative_drift": moved.relative.max().item(),
            "sup_drift": moved.sup.max().item(),
            "max_slope": slope.item(),
            "relative_max_slope": (slope / slope_bound(initial, grid)).item(),
        }

    def learned_functions(self) -> LearnedFunctions | None:
        """The adapter itself, which has the methods of `LearnedFunctions`."""
        return self

    def fitted_range(self) -> tuple[float, float] | None:
        """The ends of the interval of a fit to the pretrained activation; None if nothing was fitted."""
        return None

    # ---- the original activation, and its hooks

    def pretrained(self) -> nn.Module:
        original: nn.Module = self.__dict__["original"]
        return original

    def take_out(self) -> nn.Module:
        original = self.pretrained()
        vars(original).pop("_first_adapter", None)
        if self._has_handles:
            copy_hooks(nn.Module(), original)
            move_hooks(self, original)
        return original.train(self.training)

    def adopt(self) -> None:
        """As for every adapter. Of layers that share the activation object, the first gets the hooks, others copies."""
        super().adopt()
        original = self.__dict__["original"]
        first, hooked = vars(original).setdefault("_first_adapter", self.qualified_name), nn.Module()
        self._has_handles = first == self.qualified_name
        copy_hooks(original, hooked)
        move_hooks(original if self._has_handles else hooked, self)
        copy_hooks(hooked, original)

    # ---- files

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}calibrated"] = self.calibrated.bool()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """As for every adapter; `calibrated` is a boolean."""
        return super().adapter_tensors() | {"calibrated": self.calibrated.bool()}
