"""What adapters show beside scalars: histograms and figures, and in TensorBoard a page of charts to look at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_adapters.learned.figures import functions_figure
from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.learned.subspace_figures import (
    drift_map,
    functional_subspace_figure,
    norm_map,
    weight_spectra_figure,
)
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LearnedFunctions, mean_over_layers
from lit_adapters.model.sharding import gathered, whole
from lit_adapters.training.boards import Board
from lit_adapters.training.observer import InputObserver

PAGE = "what the adapters learn"
_MAX_PANELS = 48  # layers whose functions are drawn one by one; of more layers, some are chosen evenly

_LOSS = {"does it learn? train/loss and val/loss": r"(train|val)/loss(_step|_epoch)?"}
_ANNEALED = {"AFA: beta (linear at 0)": "adapter/beta"}
_RANKS = {"weights: stable and effective rank, mean over layers": mean_over_layers("(stable|effective)_rank")}
_SPACE = {
    "functions: dimension of all changes together": "adapter/subspace/(effective_rank|components_9.)",
    "functions: cosine to the changes at the record before": "adapter/subspace/drift_cosine",
}


def overview_layout(layers: Mapping[str, AdapterModule], subspace: bool) -> dict[str, dict[str, list[Any]]]:
    """The page for `SummaryWriter.add_custom_scalars`, with the charts that the statistics of these layers fill.

    Args:
        layers: The layers whose "functions" or "weights" are recorded.
        subspace: Whether "subspace" is recorded.
    """
    functions = [a for a in layers.values() if a.learned_functions() is not None]
    weights = [a for a in layers.values() if a.learned_functions() is None]
    charts = dict(_LOSS)
    if any(adapter.schedule is not None for adapter in layers.values()):
        charts |= _ANNEALED
    for adapter in weights:
        charts |= adapter.charts()
    # The class tells: computing the factors may need parameters that are sharded here.
    if subspace and any(type(adapter).low_rank_update is not AdapterModule.low_rank_update for adapter in weights):
        charts |= _RANKS
    for adapter in functions:
        charts |= adapter.charts()
    if subspace and functions:
        charts |= _SPACE
    return {PAGE: {title: ["Multiline", [tags]] for title, tags in charts.items()}}


def add_figures(
    boards: Sequence[Board], layers: Mapping[str, AdapterModule], observer: InputObserver, subspace: bool, step: int
) -> None:
    """Add the figures and histograms of these adapters to boards.

    Args:
        boards: Empty in a process that only helps to gather sharded parameters.
        layers: The adapters by name.
        observer: Has counted their inputs.
        subspace: Whether to draw spectra.
        step: The optimiser step.
    """
    for name, adapter in layers.items():
        learned = adapter.learned_functions()
        if learned is not None:
            for board in boards if name in observer.counts else ():
                board.counts(f"adapter/{adapter.method}/{name}/inputs", *_inputs(learned, observer.counts[name]), step)
            continue
        with gathered(adapter):  # one at a time, as its pretrained weight comes with it
            for key, parameter in adapter.adapter_parameters().items():
                values = whole(parameter.detach()).float().cpu()
                for board in boards:
                    board.values(f"adapter/{adapter.method}/{name}/{key}", values, step)
    for tag, figure in figures_of(layers, observer, subspace, draw=bool(boards)).items():
        for board in boards:
            board.figure(tag, figure, step)


def figures_of(
    layers: Mapping[str, AdapterModule], observer: InputObserver, subspace: bool, draw: bool = True
) -> dict[str, Figure]:
    """The figures of these adapters, by tag.

    Args:
        layers: The adapters by name.
        observer: Has counted their inputs.
        subspace: Whether to draw spectra.
        draw: False in a process that only helps to gather sharded parameters.
    """
    found = {name: adapter.learned_functions() for name, adapter in layers.items()}
    functions = {name: learned for name, learned in found.items() if learned is not None}
    with gathered(*(layers[name] for name in functions)):
        figures = _figures_of_functions(functions, observer, subspace) if draw and functions else {}
    norms: dict[str, float] = {}
    spectra: dict[str, Tensor] = {}
    for name, adapter in layers.items():
        if name in functions:
            continue
        with gathered(adapter):
            statistics = adapter.statistics()
            if "relative_norm" in statistics:
                norms[name] = statistics["relative_norm"]
            if subspace:
                matrices = adapter.singular_values()
                spectra |= {name: matrices["update"]} if "update" in matrices else {}
    if norms and draw:
        figures["adapter/norm_map"] = norm_map(norms)
    if spectra and draw:
        figures["adapter/weight_spectra"] = weight_spectra_figure(spectra)
    return figures


def _figures_of_functions(
    functions: Mapping[str, LearnedFunctions], observer: InputObserver, subspace: bool
) -> dict[str, Figure]:
    chosen = dict(list(functions.items())[:: -(-len(functions) // _MAX_PANELS)])
    seen = {name: density for name in chosen if (density := observer.density(name)) is not None}
    figures = {
        "adapter/functions": functions_figure(chosen, "functions", seen),
        "adapter/changes": functions_figure(chosen, "changes", seen),
        "adapter/slopes": functions_figure(chosen, "slopes", seen),
        "adapter/drift_map": drift_map(functions),
    }
    if subspace:
        space = learned_subspace(list(functions.values()))
        figures["adapter/functional_subspace"] = functional_subspace_figure(space, functions)
    return figures


def _inputs(layer: LearnedFunctions, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (D,) and limits (D + 1,) of a histogram of inputs; those outside the grid count at its ends."""
    low, high = layer.grid()[[0, -1]].tolist()
    inside = counts[1:-1].double().clone()
    inside[0] += counts[0]
    inside[-1] += counts[-1]
    return inside, torch.linspace(low, high, len(inside) + 1, dtype=torch.float64)
