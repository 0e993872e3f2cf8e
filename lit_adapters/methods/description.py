"""What an adapter can say of what it has learned, for summaries, comparisons, charts and figures.

`AdapterModule` returns these objects from its hooks, so that no file outside `methods/` has to know a method's class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

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
        scale: The factor s.
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


class Describing(nn.Module):
    """The part of `AdapterModule` that says what was learned.

    It speaks from the adapter's own tensors alone, as files may hold these without the base model. All hooks have
    defaults; each one that a method overrides makes more visible.
    """

    adapter_parameters: Callable[[], dict[str, nn.Parameter]]

    def statistics(self) -> dict[str, float]:
        """Scalars that say what this adapter has learned; each method says what they mean."""
        return {}

    def singular_values(self) -> dict[str, Tensor]:
        """Spectra of what was learned, descending, by the name of the matrix: "update" for that of a weight."""
        update = self.low_rank_update()
        return {} if update is None else {"update": update.spectrum()[1].cpu()}

    def observe(self, x: Tensor) -> dict[str, float]:
        """Scalars that say what this adapter does to its own input x of the present batch; by default none."""
        return {}

    def nearly_linear(self, dtype: torch.dtype | None = None) -> str:
        """Why a method that should be nonlinear is linear at present, in a few words; empty if it is not.

        Args:
            dtype: What the layer computes in; by default found from the base and autocast.
        """
        return ""

    held_by_update: ClassVar[tuple[str, ...]] = ()  # the trained tensors that `low_rank_update` shows, by local name

    def low_rank_update(self) -> LowRankUpdate | None:
        """The learned update of a weight as its factors; spectra, ranks and comparisons follow from it.

        `held_by_update` names the tensors that it shows. Comparisons look at other trained tensors apart.
        """
        return None

    def learned_update(self) -> Tensor | None:
        """What was learned, as one tensor that is zero at the start: the change of a bias or of output scales, say.

        For methods without factors (`low_rank_update`) and functions (`learned_functions`); None if only the base
        model could tell.
        """
        return None

    def learned_functions(self) -> LearnedFunctions | None:
        """This adapter, if what it learns are activation functions: they are drawn, and counted as "functions"."""
        return None

    def summary(self) -> AdapterSummary:
        """What `lit-adapters inspect` shows: by default what follows from the three hooks above, else sizes alone."""
        update, functions = self.low_rank_update(), self.learned_functions()
        if update is not None:
            return update.summary()
        if functions is not None:
            return functions_summary(functions)
        sizes = {name: "x".join(map(str, p.shape)) or "1" for name, p in self.adapter_parameters().items()}
        learned = self.learned_update()
        change = None if learned is None else torch.linalg.vector_norm(learned.detach().double()).item()
        return AdapterSummary(", ".join(f"{name} {size}" for name, size in sizes.items()), change)

    def charts(self) -> dict[str, str]:
        """Charts for the page of TensorBoard: the tags of each by its title.

        `each_layer` and `mean_over_layers` of `methods/description.py` give the tags of a statistic, one that
        `statistics` or `observe` returns.
        """
        return {}

    def input_histogram(self, x: Tensor) -> Tensor | None:
        """Counts (D + 2,) of a sample of the inputs x: below the grid of `learned_functions`, in its D parts, above it.

        None, the default, counts nothing.
        """
        return None
