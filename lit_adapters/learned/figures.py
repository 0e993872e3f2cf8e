"""Figures of learned functions, by matplotlib's object interface: no display and no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from lit_adapters.methods.description import LearnedFunctions, relative_drift

_MOST_CURVES = 64  # of a panel; of more functions every n-th is drawn
_COLUMNS = 4
_SEEN = 1e-3  # of the largest density: where inputs are rarer, a function is not shown
_DENSITY_HEIGHT = 0.3  # of a panel


What = Literal["functions", "changes", "slopes"]
_LABELS = {"functions": "output", "changes": "output - pretrained output", "slopes": "slope of the output"}


def functions_figure(
    layers: Mapping[str, LearnedFunctions], what: What = "functions", seen: Mapping[str, Tensor] | None = None
) -> Figure:
    """One panel a layer, over the range of its inputs: the pretrained function and each group's current one.

    Args:
        layers: The adapted activations by name.
        what: The functions; how they changed, on one scale for all layers; or their slopes.
        seen: The shares (D,) of the inputs seen in training on a layer's grid, by layer; they are drawn beside the
            density that the statistics use.
    """
    columns = min(_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    width, height = max(6.0, 3.4 * columns), 1.1 + 2.3 * rows
    figure = Figure(figsize=(width, height))
    # Margins for labels and legend, in inches; matplotlib's own layout engines take as long as the drawing.
    figure.subplots_adjust(0.75 / width, 0.55 / height, 1 - 0.15 / width, 1 - 0.8 / height, wspace=0.2, hspace=0.3)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=what == "changes").flatten()
    seen = seen or {}
    for panel, (name, adapter) in zip(panels, layers.items(), strict=False):
        _draw(panel, adapter, what, seen.get(name))
        panel.set_title(f"{name}  drift {relative_drift(adapter).max().item():.1%}", fontsize=8)
        panel.tick_params(labelsize=7, labelleft=True)
        panel.locator_params(nbins=7)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    figure.text(0.5, 0.12 / height, "input", ha="center", fontsize=9)
    figure.text(0.15 / width, 0.5, _LABELS[what], va="center", rotation="vertical", fontsize=9)
    handles = _legend(list(layers.values()), bool(seen))
    figure.legend(handles=handles, loc="upper center", ncols=3 if columns <= 2 else len(handles), fontsize=8)
    return figure


def _draw(panel: Axes, adapter: LearnedFunctions, what: What, seen: Tensor | None) -> None:
    grid, initial, current = (t.numpy() for t in adapter.functions())
    density = adapter.density.cpu().numpy()
    if what == "changes":
        initial, current = np.zeros_like(initial), current - initial
    elif what == "slopes":
        initial, current = np.gradient(initial, grid), np.gradient(current, grid, axis=-1)
    visible = density > _SEEN * density.max()
    shown = slice(visible.argmax(), len(visible) - visible[::-1].argmax())
    x, transform = grid[shown], panel.get_xaxis_transform()
    height = density[shown] / density.max() * _DENSITY_HEIGHT
    panel.fill_between(x, height, color="0.87", linewidth=0, transform=transform)
    if seen is not None:
        height = seen.numpy()[shown] / seen.max().item() * _DENSITY_HEIGHT
        panel.plot(x, height, color="tab:orange", linewidth=0.8, transform=transform)
    colours = _palette(len(current))
    for group in range(0, len(current), -(-len(current) // _MOST_CURVES)):
        panel.plot(x, current[group, shown], color=colours[group], linewidth=1.0)
    panel.plot(x, initial[shown], color="black", linewidth=1.0, linestyle="--")
    for end in adapter.fitted_range() or ():
        if x[0] < end < x[-1]:
            panel.axvline(end, color="tab:red", linewidth=0.8, linestyle=":")
    panel.set_xlim(x[0], x[-1])


def _legend(adapters: list[LearnedFunctions], seen: bool) -> list[Line2D | Patch]:
    groups = max(len(adapter.functions()[2]) for adapter in adapters)
    colours = _palette(groups)
    chosen = dict.fromkeys((0, groups - 1))
    fitted = any(adapter.fitted_range() is not None for adapter in adapters)
    measured = all(bool(adapter.calibrated) for adapter in adapters)
    return [
        Line2D([], [], color="black", linestyle="--", label="pretrained"),
        *(Line2D([], [], color=colours[g], label=f"group {g + 1} of {groups}") for g in chosen),
        Patch(color="0.87", label=f"{'measured' if measured else 'assumed'} density of inputs"),
        *([Line2D([], [], color="tab:orange", label="inputs seen in training")] if seen else []),
        *([Line2D([], [], color="tab:red", linestyle=":", label="end of the fitted range")] if fitted else []),
    ]


def _palette(count: int) -> list[str]:
    return [to_hex(c) for c in colormaps["viridis"](np.linspace(0.05, 0.9, count))]
