"""How much two sets of saved adapters have in common, layer by layer, from their tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_adapters.files.saved import SavedAdapters
from lit_adapters.learned.subspace import common_grid
from lit_adapters.learned.summary import table
from lit_adapters.methods.base import AdapterModule
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.ops.statistics import overlap, principal_angles


@dataclass(frozen=True)
class LayerComparison:
    """One layer of both sets; X is the first update, Y the second.

    Updates are s B A of weights (of LoRAN's and DoRA's too), learned changes of functions.

    Attributes:
        name: qualified name.
        method: of the first, and of the second if it is another.
        cosine: <X, Y> / (|X| |Y|); 0 if one is zero.
        norms: |X| and |Y|; Frobenius, or L2 under the mean of both densities of inputs.
        overlap: mean cos^2 of the principal angles between the column spaces; None for functions and zero updates.
        chance: what `overlap` would be for spaces in general position, max(k, l) / out.
        angles: the principal angles in degrees, ascending.
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
        layers: those of both.
        only_first: names of layers that only the first adapts.
        only_second: the same for the second.
        unlike: names of layers of both that cannot be compared, with the reason.
    """

    layers: list[LayerComparison]
    only_first: list[str]
    only_second: list[str]
    unlike: dict[str, str]


def compare(first: SavedAdapters, second: SavedAdapters) -> Comparison:
    """Compare all layers that have one name in both."""
    layers, unlike = [], {}
    for name in (n for n in first.layers if n in second.layers):
        pair = first.layers[name], second.layers[name]
        method = " and ".join(dict.fromkeys(layer.method for layer in pair))
        x, y = (layer.adapter for layer in pair)
        reason = _unlike(x, y)
        if reason:
            unlike[name] = f"{method}: {reason}"
        elif isinstance(x, LowRankAdapter) and isinstance(y, LowRankAdapter):
            layers.append(_low_rank(name, method, x, y))
        elif isinstance(x, NoRAActivation) and isinstance(y, NoRAActivation):
            layers.append(_functions(name, method, x, y))
    return Comparison(
        layers,
        [n for n in first.layers if n not in second.layers],
        [n for n in second.layers if n not in first.layers],
        unlike,
    )


def _unlike(x: AdapterModule | None, y: AdapterModule | None) -> str:
    """Why two adapters of a layer cannot be compared; empty if they can."""
    if isinstance(x, LowRankAdapter) and isinstance(y, LowRankAdapter):
        shapes = [(a.lora_B.shape[0], a.lora_A.shape[1]) for a in (x, y)]
        return "" if shapes[0] == shapes[1] else "weights of {0[0]} x {0[1]} and {1[0]} x {1[1]}".format(*shapes)
    if isinstance(x, NoRAActivation) and isinstance(y, NoRAActivation):
        return ""
    return "only low-rank updates and NoRA's functions can be compared, each with its like"


@torch.no_grad()
def _low_rank(name: str, method: str, x: LowRankAdapter, y: LowRankAdapter) -> LayerComparison:
    norms, inner = (_inner(x, x) ** 0.5, _inner(y, y) ** 0.5), _inner(x, y)
    cosine = inner / (norms[0] * norms[1]) if all(norms) else 0.0
    spaces = [x.column_space(), y.column_space()]
    if not all(space.shape[1] for space in spaces):
        return LayerComparison(name, method, cosine, norms)
    return LayerComparison(
        name,
        method,
        cosine,
        norms,
        overlap(*spaces),
        max(space.shape[1] for space in spaces) / spaces[0].shape[0],
        tuple(principal_angles(*spaces).rad2deg().tolist()),
    )


def _inner(x: LowRankAdapter, y: LowRankAdapter) -> float:
    """<s B A, s' B' A'> = s s' tr(A^T B^T B' A') = s s' sum((B^T B') * (A A'^T)), from (r, r') products alone."""
    b, a = x.lora_B.double().T @ y.lora_B.double(), x.lora_A.double() @ y.lora_A.double().T
    return x.scaling * y.scaling * (b * a).sum().item()


def _functions(name: str, method: str, x: NoRAActivation, y: NoRAActivation) -> LayerComparison:
    grid, shares = common_grid([x, y])
    weight = shares.mean(0).sqrt()
    groups = math.lcm(x.config.groups, y.config.groups)
    # A layer of few groups gives each of its functions to several neighbouring groups of the other.
    first, second = (
        (layer.learned_change(grid) * weight).repeat_interleave(groups // layer.config.groups, 0) / math.sqrt(groups)
        for layer in (x, y)
    )
    norms = first.norm().item(), second.norm().item()
    cosine = ((first * second).sum().item() / (norms[0] * norms[1])) if all(norms) else 0.0
    return LayerComparison(name, method, cosine, norms)


def report(comparison: Comparison) -> str:
    """The comparison as a table, with what only one side has, and a summary."""
    rows = [("layer", "method", "cosine", "norm change", "overlap", "by chance", "angles")]
    for layer in comparison.layers:
        space = ("", "", "")
        if layer.overlap is not None and layer.chance is not None:
            ends = f"{layer.angles[0]:.0f} to {layer.angles[-1]:.0f}°"
            space = (f"{layer.overlap:.3f}", f"{layer.chance:.3f}", ends)
        rows.append((layer.name, layer.method, f"{layer.cosine:+.3f}", f"{layer.norm_change:+.1%}", *space))
    lines = [*table(rows, right=(2, 3, 4, 5)), ""] if comparison.layers else []
    for label, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        if names:
            lines.append(f"only in the {label}, {len(names)} layers: {', '.join(names)}")
    lines += [f"not compared, {name}: {reason}" for name, reason in comparison.unlike.items()]
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
