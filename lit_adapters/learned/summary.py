"""What saved adapters have learned, layer by layer, from their tensors alone: no base model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_adapters.errors import AdapterError
from lit_adapters.files.saved import SavedAdapters, SavedLayer
from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.methods.base import Method
from lit_adapters.methods.dora import DoRAAdapter
from lit_adapters.methods.loran import LoRANAdapter
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.ops.statistics import (
    FunctionalSubspace,
    components,
    drift,
    effective_rank,
    functional_subspace,
    stable_rank,
)
from lit_adapters.schedules import Schedule

_LEGEND = (
    "change: Frobenius norm of the update s B A (LoRAN: s f(B A)); of functions, the L2 norm of R - R0 under the "
    "density of inputs, the largest over the groups. Ranks are those of s B A, or of all groups' changes together."
)


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        name: qualified name.
        method: its name.
        size: shape and rank, or groups and degrees.
        parameters: trained values.
        change: size of what was learned. Of a weight, ||dW||_F: of s B A, of s f(B A) for LoRAN; of functions, the L2
            norm of R - R0 under the layer's density of inputs, the largest over the groups. None if not known.
        singular_values: of s B A; of functions, of the stack of all groups' changes, weighted by the density.
        note: beta and the like.
        obstacle: why it does not merge into a weight; empty if it does.
    """

    name: str
    method: str
    size: str
    parameters: int
    change: float | None = None
    singular_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    note: str = ""
    obstacle: str = ""

    @property
    def stable_rank(self) -> float:
        """sum s^2 / max s^2 of the singular values."""
        return stable_rank(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of s^2 / sum s^2."""
        return effective_rank(self.singular_values)


def summarise(saved: SavedAdapters) -> list[LayerSummary]:
    """A summary of every layer, in the model's order."""
    return [_summary(name, layer) for name, layer in saved.layers.items()]


@torch.no_grad()
def _summary(name: str, layer: SavedLayer) -> LayerSummary:
    adapter = layer.adapter
    if isinstance(adapter, LowRankAdapter):
        return _low_rank(name, layer, adapter)
    if isinstance(adapter, NoRAActivation):
        return _functions(name, layer, adapter)
    return LayerSummary(
        name, layer.method, "-", layer.parameters, obstacle=f"{layer.method} has to be asked with its base model"
    )


def _low_rank(name: str, layer: SavedLayer, adapter: LowRankAdapter) -> LayerSummary:
    outputs, inputs = adapter.lora_B.shape[0], adapter.lora_A.shape[1]
    values = adapter.update_spectrum()[1]
    change, note, obstacle = values.norm().item(), "", ""
    if isinstance(adapter, AFAAdapter):
        note = f"beta {adapter.beta.item():g}"
    elif isinstance(adapter, DoRAAdapter):
        note = "magnitudes apart"
    elif isinstance(adapter, LoRANAdapter):
        change, residual = adapter.update_size()
        note = f"|f(BA) - BA| / |BA| = {residual:.1e}"
    try:
        adapter.check_linear()
    except AdapterError as error:
        obstacle = str(error)
    size = f"{outputs} x {inputs}, r = {adapter.rank}"
    return LayerSummary(name, layer.method, size, layer.parameters, change, values, note, obstacle)


def _functions(name: str, layer: SavedLayer, adapter: NoRAActivation) -> LayerSummary:
    grid, density = adapter.grid(), adapter.density.double()
    changes = adapter.learned_change(grid)
    values = functional_subspace(changes, density.expand(len(changes), -1), grid).singular_values
    config = adapter.config
    rank = "" if config.rank is None else f", r = {config.rank}"
    low, high = adapter.grid_range.tolist()
    return LayerSummary(
        name,
        layer.method,
        f"{config.groups} groups, {config.degrees[0]}/{config.degrees[1]}{rank}",
        layer.parameters,
        drift(changes, torch.zeros_like(grid), density).l2.max().item(),
        values,
        f"inputs {'measured' if adapter.calibrated else 'assumed'} in [{low:.1f}, {high:.1f}]",
        "a function of the activations: merging leaves a plain rational activation in its place",
    )


def nora_layers(saved: SavedAdapters) -> dict[str, NoRAActivation]:
    """The adapted activations by name."""
    return {n: layer.adapter for n, layer in saved.layers.items() if isinstance(layer.adapter, NoRAActivation)}


def describe_method(method: Method) -> str:
    """A configuration in words: the name of the method and its settings."""
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    words = [f"{key.replace('_', ' ')} {_plain(v)}" for key, v in settings.items() if v not in (None, [], {})]
    return f"{type(method).__name__}: {', '.join(words)}"


def _plain(value: object) -> str:
    if isinstance(value, Method):
        return f"({describe_method(value)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, (str, Schedule)) else repr(value)


def report(saved: SavedAdapters, summaries: Sequence[LayerSummary]) -> str:
    """The table of layers, totals, what else was trained, and the functional subspace, as text."""
    mebibytes = saved.file.stat().st_size / 2**20
    lines = [f"{saved.file}  {mebibytes:.2f} MiB" + (f", written by {saved.module}" if saved.module else "")]
    lines += [f"trained with {describe_method(method)}" for method in saved.methods]
    rows = [("layer", "method", "size", "parameters", "change", "stable rank", "effective rank", "merges", "note")]
    for s in summaries:
        known = s.change is not None
        numbers = (f"{s.change:.4g}", f"{s.stable_rank:.2f}", f"{s.effective_rank:.2f}") if known else ("-",) * 3
        rows.append((s.name, s.method, s.size, f"{s.parameters:,}", *numbers, "no" if s.obstacle else "yes", s.note))
    lines += ["", *table(rows, right=(3, 4, 5, 6)), ""]
    for method in dict.fromkeys(s.method for s in summaries):
        of = [s for s in summaries if s.method == method]
        lines.append(f"{method}: {len(of)} layers, {sum(s.parameters for s in of):,} parameters")
    if saved.trained:
        names = list(saved.trained)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"trained besides: {sum(saved.trained.values()):,} parameters in {shown}")
    total = sum(s.parameters for s in summaries) + sum(saved.trained.values())
    lines.append(f"total: {total:,} trained parameters")
    lines.append(_LEGEND)
    obstacles: dict[str, list[LayerSummary]] = {}
    for summary in summaries:
        if summary.obstacle:
            obstacles.setdefault(summary.obstacle.replace(repr(summary.name), ""), []).append(summary)
    for of in obstacles.values():
        lines.append(f"no merging into weights, {len(of)} layers: {of[0].obstacle}")
    if layers := list(nora_layers(saved).values()):
        lines.append(_subspace_line(learned_subspace(layers)))
    return "\n".join(lines)


def _subspace_line(space: FunctionalSubspace) -> str:
    values, functions = space.singular_values, len(space.singular_values)
    if not values.any():
        return "functional subspace: no function has changed"
    return (
        f"functional subspace: all learned changes ({functions} at most) have effective rank "
        f"{effective_rank(values):.2f}; {components(values, 0.9)} components hold 90% of their energy, "
        f"{components(values, 0.99)} hold 99%"
    )


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns, the first row being the heading; columns in `right` end together."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
