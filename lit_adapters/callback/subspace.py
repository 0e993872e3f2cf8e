"""The subspaces of what adapters learn, as a run goes on: of functions over all layers, of weights layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_adapters.methods.base import AdapterModule
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.statistics import (
    FunctionalSubspace,
    components,
    cosine,
    effective_rank,
    functional_subspace,
    leading_space,
    overlap,
    principal_angles,
    stable_rank,
)

_POINTS = 1024  # of the grid on which all layers' functions are compared
_NEGLIGIBLE = 1e-7  # of the largest singular value: directions of smaller ones are rounding errors
_LEADING = 3  # directions whose turning is followed


Change = Callable[[NoRAActivation, Tensor], Tensor]


def functional_subspace_of(
    layers: Mapping[str, NoRAActivation], k: int = 4, change: Change = NoRAActivation.change
) -> FunctionalSubspace:
    """The space of all learned changes R(x; a, b) - R(x; a0, b0), one a layer and group.

    The grid covers all layers' ranges; each change is weighted by its own layer's density on it.

    Args:
        layers: adapted activations by name.
        k: leading directions to keep.
        change: the changes (G, D) of a layer's functions on a grid (D,), where they are not those it has learned.
    """
    ends = torch.stack([layer.grid_range.cpu() for layer in layers.values()])
    grid = torch.linspace(ends.min().item(), ends.max().item(), _POINTS, dtype=torch.float64)
    changes = torch.cat([change(layer, grid) for layer in layers.values()])
    densities = torch.cat([_on(layer, grid).expand(layer.config.groups, -1) for layer in layers.values()])
    return functional_subspace(changes, densities, grid, k)


def _on(layer: NoRAActivation, grid: Tensor) -> Tensor:
    """The layer's density on another grid, (D,); by the nearest of its own points."""
    low, high = layer.grid_range.tolist()
    own = layer.density.double().cpu()
    places = ((grid - low) / (high - low) * (len(own) - 1)).round().long()
    inside = (places >= 0) & (places < len(own))
    return torch.where(inside, own[places.clamp(0, len(own) - 1)], 0.0)


class SubspaceTracker:
    """Scalars of the subspaces, some of which compare with the record before; a resumed run starts these anew.

    Args:
        layers: adapters by name.
    """

    def __init__(self, layers: Mapping[str, AdapterModule]) -> None:
        self._functions = {n: a for n, a in layers.items() if isinstance(a, NoRAActivation)}
        self._weights = {n: a for n, a in layers.items() if isinstance(a, LowRankAdapter)}
        self._leading: dict[str, Tensor] = {}  # of the pretrained weights; found when first needed
        self._before: FunctionalSubspace | None = None  # at the last record

    def layer(self, name: str) -> dict[str, float]:
        """stable_rank and effective_rank of the update (NoRA: of numerator and of denominator updates).

        For weights also overlap: mean cos^2 of the angles between the column space of the update and the space of the
        r leading left singular vectors of the pretrained weight; r / out by chance.
        """
        if name in self._functions:
            scalars = {}
            for part, values in self._functions[name].singular_values().items():
                scalars[f"{part}_stable_rank"] = stable_rank(values)
            return scalars
        if name not in self._weights:
            return {}
        adapter = self._weights[name]
        u, values = adapter.update_spectrum()
        if not values.any():
            return {}
        u = u[:, values > _NEGLIGIBLE * values.max()]
        if name not in self._leading:
            self._leading[name] = leading_space(adapter.base_matrix(), adapter.rank)
        return {
            "stable_rank": stable_rank(values),
            "effective_rank": effective_rank(values),
            "overlap": overlap(self._leading[name], u),
        }

    def functions(self) -> dict[str, float]:
        """Of the stack of all learned changes of functions; empty without NoRA, and before anything was learned.

        effective_rank; components_90 and components_99: directions that hold that share of the energy; drift_cosine:
        between all changes now and at the record before; rotation: the largest principal angle, in radians, between
        the spaces of the three leading directions now and then.
        """
        if not self._functions:
            return {}
        space = functional_subspace_of(self._functions, _LEADING)
        if not space.singular_values.any():
            return {}
        scalars = {
            "effective_rank": effective_rank(space.singular_values),
            "components_90": float(components(space.singular_values, 0.90)),
            "components_99": float(components(space.singular_values, 0.99)),
        }
        if self._before is not None:
            scalars["drift_cosine"] = cosine(space.stack, self._before.stack)
            scalars["rotation"] = principal_angles(space.directions.T, self._before.directions.T).max().item()
        self._before = space
        return scalars
