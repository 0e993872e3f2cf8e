"""Follow the subspaces of what adapters learn: of functions over all layers together, of weights layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lit_adapters.learned.subspace import Change, learned_change, learned_subspace
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.ops.statistics import (
    FunctionalSubspace,
    components,
    cosine,
    effective_rank,
    leading_subspace,
    overlap,
    principal_angles,
    stable_rank,
)

_NEGLIGIBLE = 1e-7  # of the largest singular value: directions of smaller ones are rounding errors
_LEADING = 3  # directions whose turning is followed


def _leading(space: FunctionalSubspace) -> Tensor:
    """The leading directions (D, k), without those that are rounding errors."""
    values = space.singular_values[: len(space.directions)]
    return space.directions[values > _NEGLIGIBLE * values[0]].T


class SubspaceTracker:
    """Scalars of the learned subspaces; some compare with the record before.

    Args:
        layers: The adapters by name.
        coefficients: The functions' coefficients at the record before, in a run that is resumed.

    Attributes:
        coefficients: The functions' coefficients at the last record that found them changed, by layer.
    """

    def __init__(
        self, layers: Mapping[str, AdapterModule], coefficients: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self._layers = dict(layers)
        found = {name: adapter.learned_functions() for name, adapter in layers.items()}
        self._functions = {name: functions for name, functions in found.items() if functions is not None}
        self._leading: dict[str, Tensor] = {}  # of the pretrained weights; found when first needed
        self._before: FunctionalSubspace | None = None  # at the last record
        self.coefficients = dict(coefficients or {})
        if self.coefficients:
            kept = {id(layer): self.coefficients[name] for name, layer in self._functions.items()}
            self._before = self._space(lambda layer, grid: layer.learned_change(grid, kept[id(layer)]))

    def layer(self, name: str) -> dict[str, float]:
        """stable_rank and effective_rank of a layer's update; of another matrix its stable rank, <matrix>_stable_rank.

        The matrices are those of `AdapterModule.singular_values`. Where the update is known by its factors there is
        also overlap: mean cos^2 of the angles between its column space and the space of the r leading left singular
        vectors of the pretrained weight; r / out by chance.
        """
        adapter = self._layers[name]
        scalars: dict[str, float] = {}
        for matrix, values in adapter.singular_values().items():
            if matrix != "update":
                scalars[f"{matrix}_stable_rank"] = stable_rank(values)
            elif values.any():
                scalars["stable_rank"] = stable_rank(values)
                scalars["effective_rank"] = effective_rank(values)
                scalars |= self._overlap(name, adapter)
        return scalars

    def _overlap(self, name: str, adapter: AdapterModule) -> dict[str, float]:
        update = adapter.low_rank_update()
        if update is None or not isinstance(adapter, WeightAdapter) or not adapter.layer.can_read:
            return {}
        if name not in self._leading:
            self._leading[name] = leading_subspace(adapter.base_matrix(), update.rank)
        return {"overlap": overlap(self._leading[name], update.column_space())}

    def functions(self) -> dict[str, float]:
        """Statistics of the stack of all learned changes of functions; empty while there are none.

        effective_rank; components_90 and components_99: directions that hold that share of the energy; drift_cosine:
        between all changes now and at the record before; rotation: the largest principal angle, in radians, between
        the spaces of the three leading directions now and then (of fewer, where there are no more).
        """
        if not self._functions:
            return {}
        space = self._space()
        if not space.singular_values.any():
            return {}
        scalars = {
            "effective_rank": effective_rank(space.singular_values),
            "components_90": float(components(space.singular_values, 0.90)),
            "components_99": float(components(space.singular_values, 0.99)),
        }
        if self._before is not None:
            scalars["drift_cosine"] = cosine(space.stack, self._before.stack)
            now, then = _leading(space), _leading(self._before)
            if now.shape == then.shape:
                scalars["rotation"] = principal_angles(now, then).max().item()
        self._before = space
        for name, layer in self._functions.items():
            a, b = layer.coefficients()
            self.coefficients[name] = a.detach().cpu(), b.detach().cpu()
        return scalars

    def _space(self, change: Change = learned_change) -> FunctionalSubspace:
        return learned_subspace(list(self._functions.values()), _LEADING, change)
