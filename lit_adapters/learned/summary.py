"""What saved adapters have learned, layer by layer, from their tensors alone: no base model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lit_adapters.console import text_table
from lit_adapters.files.saved import SavedAdapters, SavedLayer
from lit_adapters.learned.computable import computable
from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.methods.description import AdapterSummary, LearnedFunctions
from lit_adapters.methods.method import Method
from lit_adapters.ops.statistics import FunctionalSubspace, components, effective_rank, stable_rank
from lit_adapters.schedules import Schedule

_LEGEND = (
    "change: Frobenius norm of the update s B A (LoRAN: s f(B A)); of functions, the L2 norm of R - R0 under the "
    "density of inputs, the largest over the groups. Ranks are those of s B A, or of all groups' changes together."
)


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        name: The qualified name.
        method: The method's name.
        parameters: The number of trained values.
        learned: What the adapter says of what it has learned.
        merges: "yes" or "no"; for a method that was not built here, what `Method.merges` says.
        obstacle: Why the layer does not merge into its parameters; empty if it does.
        linear: Why a nonlinear method is linear here in bfloat16; empty if it is not.
    """

    name: str
    method: str
    parameters: int
    learned: AdapterSummary
    merges: str
    obstacle: str = ""
    linear: str = ""

    @property
    def stable_rank(self) -> float:
        """The sum of the squared singular values over the largest square."""
        return stable_rank(self.learned.singular_values)

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the squared singular values, normalised to sum 1."""
        return effective_rank(self.learned.singular_values)


def summarise(saved: SavedAdapters) -> list[LayerSummary]:
    """A summary of every layer, in the model's order."""
    return [_summary(name, layer) for name, layer in saved.layers.items()]


@torch.no_grad()
def _summary(name: str, layer: SavedLayer) -> LayerSummary:
    if layer.adapter is None:
        return LayerSummary(name, layer.method, layer.parameters, AdapterSummary("-"), layer.merges)
    obstacle = layer.adapter.merge_obstacle()
    merges = "no" if obstacle else "yes"
    with computable(repr(name)):
        learned, linear = layer.adapter.summary(), layer.adapter.nearly_linear(torch.bfloat16)
    return LayerSummary(name, layer.method, layer.parameters, learned, merges, obstacle, linear)


def learned_functions(saved: SavedAdapters) -> dict[str, LearnedFunctions]:
    """The adapted activations by name."""
    found = {n: layer.adapter.learned_functions() for n, layer in saved.layers.items() if layer.adapter is not None}
    return {name: functions for name, functions in found.items() if functions is not None}


def describe_method(method: Method) -> str:
    """A configuration in words: the name of the method and its settings."""
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    words = [f"{key.replace('_', ' ')} {_in_words(v)}" for key, v in settings.items() if v not in (None, [], {})]
    return f"{type(method).__name__}: {', '.join(words)}"


def _in_words(value: object) -> str:
    """A setting as a person would write it."""
    if isinstance(value, Method):
        return f"({describe_method(value)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_in_words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, (str, Schedule)) else repr(value)


def report(saved: SavedAdapters, summaries: Sequence[LayerSummary]) -> str:
    """The table of layers, totals, what else was trained, and the functional subspace, as text."""
    mebibytes = saved.file.stat().st_size / 2**20
    lines = [f"{saved.file}  {mebibytes:.2f} MiB" + (f", written by {saved.module}" if saved.module else "")]
    lines += [f"trained with {describe_method(method)}" for method in saved.methods]
    heading = ("layer", "method", "size", "parameters", "change", "stable rank", "effective rank", "merges", "note")
    lines += ["", text_table([heading, *map(_row, summaries)], right=(3, 4, 5, 6)), ""]
    for method in dict.fromkeys(s.method for s in summaries):
        layers = [s for s in summaries if s.method == method]
        lines.append(f"{method}: {len(layers)} layers, {sum(s.parameters for s in layers):,} parameters")
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
    for hindered in obstacles.values():
        lines.append(f"no merging into weights, {len(hindered)} layers: {hindered[0].obstacle}")
    if linear := [summary for summary in summaries if summary.linear]:
        lines.append(
            f"warning: {len(linear)} layers of a nonlinear method do what LoRA does; in {linear[0].name!r}, "
            f"{linear[0].linear}"
        )
    if functions := list(learned_functions(saved).values()):
        with computable("the functions of all layers"):
            lines.append(_subspace_line(learned_subspace(functions)))
    return "\n".join(lines)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    learned = layer.learned
    change = "-" if learned.change is None else f"{learned.change:.4g}"
    ranks = ("-", "-")
    if len(learned.singular_values):
        ranks = (f"{layer.stable_rank:.2f}", f"{layer.effective_rank:.2f}")
    parameters = f"{layer.parameters:,}"
    return layer.name, layer.method, learned.size, parameters, change, *ranks, layer.merges, learned.note


def _subspace_line(space: FunctionalSubspace) -> str:
    values, functions = space.singular_values, len(space.singular_values)
    if not values.any():
        return "functional subspace: no function has changed"
    return (
        f"functional subspace: all learned changes ({functions} at most) have effective rank "
        f"{effective_rank(values):.2f}; {components(values, 0.9)} components hold 90% of their energy, "
        f"{components(values, 0.99)} hold 99%"
    )
