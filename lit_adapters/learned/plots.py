"""A figure of what saved adapters have learned, by matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.learned.summary import LayerSummary
from lit_adapters.methods.description import LearnedFunctions

_MAX_CURVES = 12  # with more kinds of layers, one curve through all of them
_MAX_NAMES = 40  # layer names that fit under an axis
_FLOOR = 1e-4  # of the largest singular value: the rest is not shown


def learned_figure(layers: Sequence[LayerSummary], functions: Sequence[LearnedFunctions]) -> Figure:
    """A row of three panels for weights and one for functions: size of the change, its rank, its spectrum.

    Layers that differ in their numbers alone, as the blocks of a transformer do, share a curve over these numbers.

    Args:
        layers: Layers of any methods; those whose change is not known are left out.
        functions: The adapted activations, for the spectrum over all layers.
    """
    known = [layer for layer in layers if layer.learned.change is not None]
    rows = [[x for x in known if x.learned.kind == kind] for kind in ("weights", "functions")]
    rows = [row for row in rows if row]
    figure = Figure(figsize=(15, 0.6 + 4.4 * max(1, len(rows))), layout="constrained")
    if not rows:
        figure.text(0.5, 0.5, "no layer whose change can be told from its file", ha="center")
        return figure
    for row, panels in zip(rows, figure.subplots(len(rows), 3, squeeze=False), strict=True):
        is_functions = row[0].learned.kind == "functions"
        what = "change of the functions, L2" if is_functions else "norm of the update, Frobenius"
        _curves(panels[0], row, [x.learned.change or 0.0 for x in row], what)
        _curves(panels[1], row, [x.effective_rank for x in row], "effective rank (dots: stable rank)")
        _curves(panels[1], row, [x.stable_rank for x in row], None)
        panels[0].set_ylim(bottom=0)
        panels[1].set_ylim(bottom=0)
        _spectra(panels[2], row)
        if is_functions:
            _add_subspace(panels[2], functions)
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(fontsize=7, loc="best")
    return figure


def _layer_kind(name: str) -> str:
    """The name without its numbers: what the layer is within its block."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _curves(panel: Axes, layers: Sequence[LayerSummary], values: Sequence[float], label: str | None) -> None:
    """Values by layer: lines with a `label`, dots without."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kinds.setdefault(_layer_kind(layer.name), []).append(i)
    apart = len(kinds) > _MAX_CURVES or len(kinds) == len(layers)
    groups = {"": list(range(len(layers)))} if apart else kinds
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for colour, (kind, members) in zip(palette, groups.items(), strict=False):
        style = {"marker": "o", "markersize": 4} if label else {"marker": ".", "linestyle": ":", "linewidth": 0.8}
        shown = {"label": kind} if label and kind else {}
        panel.plot(range(len(members)), [values[i] for i in members], color=colour, **style, **shown)  # type: ignore[arg-type]
    if not label:
        return
    panel.set_title(label, fontsize=9)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
    if apart and len(layers) <= _MAX_NAMES:
        panel.set_xticks(range(len(layers)), [x.name for x in layers], rotation=90, fontsize=6)
    else:
        panel.set_xlabel("layer" if apart else "block", fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spectra(panel: Axes, layers: Sequence[LayerSummary]) -> None:
    """Each layer's singular values relative to its largest, the colour telling first layers from last."""
    colours = colormaps["viridis"](np.linspace(0.05, 0.9, len(layers)))
    for colour, layer in zip(colours, layers, strict=True):
        values = layer.learned.singular_values.numpy()
        if values.size and values.max() > 0:
            panel.plot(np.arange(1, len(values) + 1), values / values.max(), color=colour, linewidth=0.9, marker=".")
    panel.set_yscale("log")
    panel.set_ylim(_FLOOR, 1.5)
    panel.set_title("singular values / largest", fontsize=9)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    scale = ScalarMappable(Normalize(1, max(2, len(layers))), colormaps["viridis"])
    bar = panel.figure.colorbar(scale, ax=panel, pad=0.01, ticks=MaxNLocator(integer=True))
    bar.set_label("layer, first to last", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _add_subspace(panel: Axes, functions: Sequence[LearnedFunctions]) -> None:
    """The spectrum of all functions of all layers together."""
    values = learned_subspace(functions).singular_values.numpy()
    if values.max() > 0:
        values = values[values > _FLOOR * values.max()] / values.max()
        panel.plot(range(1, len(values) + 1), values, color="black", linewidth=2, label="all layers together")
        panel.legend(fontsize=7)
