"""Compare two sets of saved adapters layer by layer, from their tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_adapters.console import text_table
from lit_adapters.files.saved import SavedAdapters
from lit_adapters.learned.computable import computable
from lit_adapters.learned.subspace import common_grid
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LearnedFunctions, LowRankUpdate
from lit_adapters.ops.statistics import cosine, overlap, principal_angles


@dataclass(frozen=True)
class LayerComparison:
    """One layer of both sets; X is the first update, Y the second.

    An update is s B A for low-rank methods (LoRAN and DoRA too), the learned changes for functions, and what
    `AdapterModule.learned_update` returns for other methods.

    Attributes:
        name: The qualified name.
        method: The method of the first, and that of the second if it is another.
        cosine: <X, Y> / (|X| |Y|); 0 if one is zero.
        norms: |X| and |Y|; Frobenius, or L2 under the mean of both densities of inputs.
        overlap: The mean cos^2 of the principal angles between the column spaces; None where there are none.
        chance: What `overlap` would be for spaces in general position, max(k, l) / out.
        angles: The principal angles in degrees, ascending.
    """

    name: str
    method: str
    cosine: float
    norms: tuple[float, float]
    overlap: float | None = None
    chance: float | None = None
    angles: tuple[float, ...] = ()

    @property
    def norm_change(self) -> float:
        """|Y| / |X| - 1."""
        return self.norms[1] / self.norms[0] - 1 if self.norms[0] > 0 else math.inf


@dataclass(frozen=True)
class Comparison:
    """Two sets of adapters.

    Attributes:
        layers: The layers that are in both.
        only_first: Names of layers that only the first adapts.
        only_second: Names of layers that only the second adapts.
        unlike: Why a layer of both cannot be compared, by its name.
        beside: What differs beside the updates that are compared (a magnitude, a bias, beta), by the layer's name.
    """

    layers: list[LayerComparison]
    only_first: list[str]
    only_second: list[str]
    unlike: dict[str, str]
    beside: dict[str, str] = field(default_factory=dict)


def compare(first: SavedAdapters, second: SavedAdapters) -> Comparison:
    """Compare all layers that have one name in both."""
    layers, unlike, beside = [], {}, {}
    for name in (n for n in first.layers if n in second.layers):
        x, y = first.layers[name], second.layers[name]
        method = " and ".join(dict.fromkeys((x.method, y.method)))
        with computable(repr(name)):
            compared = _compare(name, method, x.adapter, y.adapter)
            if text := _beside(x.adapter, y.adapter):
                beside[name] = text
        if isinstance(compared, str):
            unlike[name] = f"{method}: {compared}"
        else:
            layers.append(compared)
    return Comparison(
        layers,
        [n for n in first.layers if n not in second.layers],
        [n for n in second.layers if n not in first.layers],
        unlike,
        beside,
    )


_STATE = ("beta", "frequency")  # buffers that move in training


def _beside(x: AdapterModule | None, y: AdapterModule | None) -> str:
    """What two updates of low rank do not show of their adapters, in words; empty if it is alike."""
    if x is None or y is None or x.low_rank_update() is None or y.low_rank_update() is None:
        return ""
    first, second = x.adapter_tensors(), y.adapter_tensors()
    found = []
    trained = {**x.adapter_parameters(), **y.adapter_parameters()}
    others = [key for key in trained if key not in (*x.held_by_update, *y.held_by_update)]
    for key in (key for key in (*others, *_STATE) if key in first and key in second):
        a, b = first[key].detach().double(), second[key].detach().double()
        if a.shape != b.shape:
            found.append(f"{key} by its shape, {tuple(a.shape)} and {tuple(b.shape)}")
        elif torch.equal(a, b):
            continue
        elif a.numel() == 1:
            found.append(f"{key} {a.item():.3g} and {b.item():.3g}")
        else:
            size = torch.maximum(a.norm(), b.norm()).item()
            found.append(f"{key} by {(a - b).norm().item() / size:.1%} of its norm")
    return ", ".join(found)


@torch.no_grad()
def _compare(name: str, method: str, x: AdapterModule | None, y: AdapterModule | None) -> LayerComparison | str:
    """The comparison of two adapters of a layer, or why they cannot be compared."""
    if x is None or y is None:
        return "what these adapters have learned is known only with their base model"
    updates = x.low_rank_update(), y.low_rank_update()
    if updates[0] is not None and updates[1] is not None:
        return _low_rank(name, method, updates[0], updates[1])
    functions = x.learned_functions(), y.learned_functions()
    if functions[0] is not None and functions[1] is not None:
        return _functions(name, method, functions[0], functions[1])
    learned = x.learned_update(), y.learned_update()
    if learned[0] is not None and learned[1] is not None:
        return _tensors(name, method, learned[0], learned[1])
    return "only two updates of a weight, or two sets of functions, or two updates of another tensor can be compared"


def _low_rank(name: str, method: str, x: LowRankUpdate, y: LowRankUpdate) -> LayerComparison | str:
    if x.shape != y.shape:
        return f"weights of {x.shape[0]} x {x.shape[1]} and {y.shape[0]} x {y.shape[1]}"
    norms, inner = (x.inner(x) ** 0.5, y.inner(y) ** 0.5), x.inner(y)
    similarity = inner / (norms[0] * norms[1]) if all(norms) else 0.0
    spaces = [x.column_space(), y.column_space()]
    if not all(space.shape[1] for space in spaces):
        return LayerComparison(name, method, similarity, norms)
    return LayerComparison(
        name,
        method,
        similarity,
        norms,
        overlap(*spaces),
        max(space.shape[1] for space in spaces) / spaces[0].shape[0],
        tuple(principal_angles(*spaces).rad2deg().tolist()),
    )


def _tensors(name: str, method: str, x: Tensor, y: Tensor) -> LayerComparison | str:
    if x.shape != y.shape:
        return f"tensors of shapes {tuple(x.shape)} and {tuple(y.shape)}"
    norms = x.double().norm().item(), y.double().norm().item()
    return LayerComparison(name, method, cosine(x, y), norms)


def _functions(name: str, method: str, x: LearnedFunctions, y: LearnedFunctions) -> LayerComparison:
    grid, shares = common_grid([x, y])
    weight = shares.mean(0).sqrt()
    changes = [layer.learned_change(grid) * weight for layer in (x, y)]
    groups = math.lcm(len(changes[0]), len(changes[1]))
    # A layer of few groups gives each of its functions to several neighbouring groups of the other.
    first, second = (change.repeat_interleave(groups // len(change), 0) / math.sqrt(groups) for change in changes)
    norms = first.norm().item(), second.norm().item()
    inner = (first * second).sum().item()
    return LayerComparison(name, method, inner / (norms[0] * norms[1]) if all(norms) else 0.0, norms)


def report(comparison: Comparison) -> str:
    """The comparison as a table, with what only one side has, and a summary."""
    heading = ("layer", "method", "cosine", "norm change", "overlap", "by chance", "angles")
    rows: list[tuple[str, ...]] = [heading]
    for layer in comparison.layers:
        space = ("", "", "")
        if layer.overlap is not None and layer.chance is not None:
            ends = f"{layer.angles[0]:.0f} to {layer.angles[-1]:.0f}°"
            space = (f"{layer.overlap:.3f}", f"{layer.chance:.3f}", ends)
        rows.append((layer.name, layer.method, f"{layer.cosine:+.3f}", f"{layer.norm_change:+.1%}", *space))
    lines = [text_table(rows, right=(2, 3, 4, 5)), ""] if comparison.layers else []
    for label, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        if names:
            lines.append(f"only in the {label}, {len(names)} layers: {', '.join(names)}")
    lines += [f"not compared, {name}: {reason}" for name, reason in comparison.unlike.items()]
    lines += [f"not in the table, {name} differs in {what}" for name, what in comparison.beside.items()]
    return "\n".join([*lines, _summary(comparison.layers)])


def _summary(layers: Sequence[LayerComparison]) -> str:
    if not layers:
        return "no layer is in both"
    text = f"{len(layers)} layers in both: mean cosine {_mean([x.cosine for x in layers]):+.3f}"
    spaces = [x for x in layers if x.overlap is not None]
    if spaces:
        text += f", mean overlap of column spaces {_mean([x.overlap or 0.0 for x in spaces]):.3f} "
        text += f"({_mean([x.chance or 0.0 for x in spaces]):.3f} by chance)"
    return text


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
