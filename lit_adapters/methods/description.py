"""What an adapter can say of what it has learned, for summaries, comparisons, charts and figures.

`AdapterModule` returns these objects from its hooks, so that no file outside `methods/` has to know a method's class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_adapters.ops.statistics import drift, functional_subspace, product_spectrum

_NEGLIGIBLE = 1e-7  # of the largest singular value: directions of smaller ones are rounding errors of float32 factors


@dataclass(frozen=True)
class AdapterSummary:
    """What `lit-adapters inspect` shows of one adapter.

    Attributes:
        size: What the adapter is made of, such as "64 x 32, r = 8".
        change: The norm of what was learned: Frobenius for the update of a weight, L2 under the density of inputs for
            functions (the largest over the groups). None if it is not known without the base model.
        singular_values: The spectrum of what was learned; empty if it has none.
        note: What else is worth a column, such as "beta 0.5".
        kind: Whether `change` measures a tensor of the model ("weights") or activation functions ("functions").
    """

    size: str
    change: float | None = None
    singular_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    note: str = ""
    kind: Literal["weights", "functions"] = "weights"


@dataclass(frozen=True)
class LowRankUpdate:
    """The update s B A of a weight (out, in), held as its factors.

    Attributes:
        b: B (out, r).
        a: A (r, in).
        scale: s.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The width r of the factors."""
        return self.a.shape[0]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """The left singular vectors (out, r) and singular values (r,) of s B A, in float64."""
        u, values = product_spectrum(self.b.detach(), self.a.detach())
        return u, abs(self.scale) * values

    def column_space(self) -> Tensor:
        """An orthonormal basis (out, k) of the columns of B A, k its numerical rank; k = 0 for a zero update."""
        u, values = self.spectrum()
        return u[:, values > _NEGLIGIBLE * values.max()] if values.any() else u[:, :0]

    def inner(self, other: LowRankUpdate) -> float:
        """The inner product <s B A, s' B' A'> = s s' sum((B^T B') * (A A'^T)), from (r, r') products alone."""
        b, a = self.b.double().T @ other.b.double(), self.a.double() @ other.a.double().T
        return self.scale * other.scale * (b * a).sum().item()

    def summary(self) -> AdapterSummary:
        """Size, norm and spectrum of the update."""
        values = self.spectrum()[1]
        outputs, inputs = self.shape
        return AdapterSummary(f"{outputs} x {inputs}, r = {self.rank}", values.norm().item(), values)


class LearnedFunctions(Protocol):
    """An adapted activation: G functions of one input, one for each group of channels, beside the pretrained one.

    Attributes:
        density: Share of the layer's inputs around each point of `grid`, (D,).
        calibrated: Whether `density` was measured on real inputs, and not assumed; a tensor with one boolean.
    """

    density: Tensor
    calibrated: Tensor

    def grid(self) -> Tensor:
        """The points (D,) that `density` belongs to, ascending, float64 on the CPU."""

    def fitted_range(self) -> tuple[float, float] | None:
        """The inputs between which the functions were fitted to the pretrained one; None if nothing was fitted."""

    def functions(self) -> tuple[Tensor, Tensor, Tensor]:
        """The grid (D,), the pretrained function on it (D,), and the current functions (G, D); float64 on the CPU."""

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """The two tensors that the functions are computed from; `learned_change` takes them again later."""

    def learned_change(self, x: Tensor, coefficients: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What training added to each function at inputs x (D,): (G, D), float64 on the CPU; zero at the start.

        Args:
            x: The inputs.
            coefficients: Those of another moment; by default the present ones.
        """


def relative_drift(layer: LearnedFunctions) -> Tensor:
    """Distance of each function from the pretrained one under the density of inputs, relative to that one: (G,)."""
    _, initial, current = layer.functions()
    return drift(current, initial, layer.density.double().cpu()).relative


def functions_summary(layer: LearnedFunctions) -> AdapterSummary:
    """Size, norm and spectrum of the learned changes of an adapted activation."""
    grid, density = layer.grid(), layer.density.double()
    changes = layer.learned_change(grid)
    low, high = grid[0].item(), grid[-1].item()
    return AdapterSummary(
        size=f"{len(changes)} groups",
        change=drift(changes, torch.zeros_like(grid), density).l2.max().item(),
        singular_values=functional_subspace(changes, density.expand(len(changes), -1), grid).singular_values,
        note=f"inputs {'measured' if layer.calibrated else 'assumed'} in [{low:.1f}, {high:.1f}]",
        kind="functions",
    )


def each_layer(statistic: str) -> str:
    """The tags under which a statistic of single layers is logged, as a chart of TensorBoard selects them."""
    return f"adapter/(?!summary).+/{statistic}"


def mean_over_layers(statistic: str) -> str:
    """The tag under which the mean of a statistic over the layers is logged, as a chart of TensorBoard selects it."""
    return f"adapter/summary/{statistic}"
