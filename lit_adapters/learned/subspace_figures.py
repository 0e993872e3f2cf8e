"""Figures of spectra, and maps of where in the network adapters moved: one figure for all layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from lit_adapters.learned.subspace import common_grid
from lit_adapters.methods.description import LearnedFunctions, relative_drift
from lit_adapters.ops.statistics import FunctionalSubspace, components, effective_rank

_TINY = 1e-12
_MOST_COLUMNS = 64  # of a map
_SHOWN = 10  # singular values of the functional subspace: as many as a function has coefficients


def functional_subspace_figure(space: FunctionalSubspace, layers: Mapping[str, LearnedFunctions]) -> Figure:
    """The spectrum of the stack of all learned changes, and its leading directions drawn as functions.

    A direction is divided by the root of the layers' mean density, which weighted it, and drawn where that is not
    negligible; its sign is arbitrary.
    """
    figure = Figure(figsize=(10.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = space.singular_values.numpy()
    energy = values**2 / max((values**2).sum(), _TINY)
    count = min(len(energy), _SHOWN)
    left.bar(range(1, count + 1), energy[:count], color="tab:blue")
    left.set(xlabel="direction", ylabel="share of the energy", xticks=range(1, count + 1))
    left.set_title(
        f"effective rank {effective_rank(space.singular_values):.2f}, "
        f"{components(space.singular_values, 0.9)} directions hold 90%, "
        f"{components(space.singular_values, 0.99)} hold 99%",
        fontsize=9,
    )
    grid = space.grid.numpy()
    shares = common_grid(list(layers.values()))[1].mean(0).numpy()
    density = shares / np.gradient(grid)
    visible = density > 1e-3 * density.max()
    known = np.count_nonzero(values > 1e-9 * max(values[0], _TINY))
    for number, direction in enumerate(space.directions.numpy()[:known], 1):
        right.plot(grid[visible], (direction / np.sqrt(shares.clip(_TINY)))[visible], label=f"direction {number}")
    right.fill_between(
        grid[visible], 0.3 * density[visible] / density.max(), color="0.87", transform=right.get_xaxis_transform()
    )
    right.set(xlabel="input", title="principal functions (grey: density of inputs)")
    right.title.set_fontsize(9)
    right.legend(fontsize=8)
    return figure


def drift_map(layers: Mapping[str, LearnedFunctions]) -> Figure:
    """A map of layers by groups: the drift of each function from the pretrained one, relative to that one.

    Where a layer has more than 64 groups, a cell shows the largest drift of several neighbours.
    """
    rows = {name: relative_drift(layer).numpy() for name, layer in layers.items()}
    joined = -(-max(len(row) for row in rows.values()) // _MOST_COLUMNS)
    rows = {name: np.maximum.reduceat(row, range(0, len(row), joined)) for name, row in rows.items()}
    width = max(len(row) for row in rows.values())
    values = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows.values()):
        values[place, : len(row)] = row
    axis = "group" if joined == 1 else f"first of {joined} groups"
    return _map(values, list(rows), [str(g * joined + 1) for g in range(width)], axis, "relative drift of the function")


def norm_map(norms: Mapping[str, float]) -> Figure:
    """A map of blocks by kinds of layers: ||dW|| / ||W0||.

    Args:
        norms: The ratio by layer name; everything up to the last number of a name is its block.
    """
    places = {name: _block_and_kind(name) for name in norms}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    values = np.full((len(blocks), len(kinds)), np.nan)
    for name, (block, kind) in places.items():
        values[blocks.index(block), kinds.index(kind)] = norms[name]
    return _map(values, blocks, kinds, "layer", "||dW|| / ||W||")


def _block_and_kind(name: str) -> tuple[str, str]:
    found = re.match(r"(.*\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)


def _map(values: np.ndarray, rows: list[str], columns: list[str], axis: str, label: str) -> Figure:
    longest = max(map(len, rows + columns))
    figure = Figure(
        figsize=(2.2 + 0.075 * longest + 0.42 * len(columns), 1.4 + 0.24 * len(rows) + 0.05 * longest),
        layout="constrained",
    )
    panel = figure.subplots()
    image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest")
    panel.set_yticks(range(len(rows)), rows, fontsize=7)
    panel.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if max(map(len, columns)) > 3 else 0)
    panel.set_xlabel(axis)
    figure.colorbar(image, label=label)
    return figure


def weight_spectra_figure(spectra: Mapping[str, Tensor]) -> Figure:
    """The singular values (r,) of each layer's update, one line a layer, coloured from the first layer to the last."""
    rows = [s.numpy() for s in spectra.values()]
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    panel = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(rows)))
    for values, colour in zip(rows, colours, strict=True):
        panel.plot(range(1, len(values) + 1), np.maximum(values, _TINY), color=colour, linewidth=0.8)
    top = max(values.max() for values in rows)
    panel.set_yscale("log")
    panel.set_ylim(1e-4 * max(top, _TINY), 2 * max(top, _TINY))
    panel.set(xlabel="singular value of the update (purple: first layers, green: last)", ylabel="size")
    return figure
