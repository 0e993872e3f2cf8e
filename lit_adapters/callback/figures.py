"""Pictures of learned functions, drawn with matplotlib's object interface: no display and no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_adapters.methods.nora import NoRAActivation

_COLUMNS = 4


def functions_figure(layers: Mapping[str, NoRAActivation], derivative: bool = False) -> Figure:
    """One panel a layer: the pretrained function (black), each group's current one, the inputs' density behind.

    Args:
        layers: adapted activations by qualified name.
        derivative: draw slopes, whose largest value bounds the Lipschitz constant, in the place of values.
    """
    columns = min(_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, adapter) in zip(panels, layers.items(), strict=False):
        _draw(panel, name, adapter, derivative)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    what = "slope" if derivative else "value"
    figure.suptitle(f"{what} of each activation: pretrained (black), adapted groups (colour), density of inputs (grey)")
    return figure


def _draw(panel: Axes, name: str, adapter: NoRAActivation, derivative: bool) -> None:
    grid, initial, current = (t.numpy() for t in adapter.functions())
    if derivative:
        initial, current = np.gradient(initial, grid), np.gradient(current, grid, axis=-1)
    for row, colour in zip(current, _palette(len(current)), strict=True):
        panel.plot(grid, row, color=colour, linewidth=1.0)
    panel.plot(grid, initial, color="black", linewidth=1.2, linestyle="--")
    density = adapter.density.cpu().numpy()
    behind = panel.twinx()
    behind.fill_between(grid, density, color="0.85", linewidth=0)
    behind.set_ylim(0, density.max() * 3)
    behind.set_axis_off()
    behind.set_zorder(panel.get_zorder() - 1)
    panel.patch.set_visible(False)
    panel.set_title(f"{name}  drift {adapter.statistics()['relative_drift']:.1%}", fontsize=8)
    panel.tick_params(labelsize=7)


def _palette(count: int) -> list[tuple[float, ...]]:
    return [tuple(c) for c in colormaps["viridis"](np.linspace(0.05, 0.9, count))]
