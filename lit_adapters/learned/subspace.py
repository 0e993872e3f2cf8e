"""Put the functions of several adapted activations on one grid, each under its own density of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_adapters.methods.description import LearnedFunctions
from lit_adapters.ops.statistics import FunctionalSubspace, functional_subspace

_POINTS = 1024  # of the grid on which the functions of all layers are compared
_LEAST_POINTS = 32  # in the range of each layer
_MOST_FUNCTIONS = 2048  # of all layers together; of more, every n-th of each layer is taken

Change = Callable[[LearnedFunctions, Tensor], Tensor]


def learned_change(layer: LearnedFunctions, x: Tensor) -> Tensor:
    """What training added to each function of a layer at inputs x (D,): (G, D)."""
    return layer.learned_change(x)


def common_grid(layers: Sequence[LearnedFunctions]) -> tuple[Tensor, Tensor]:
    """Points (D,) in the ranges of all layers, and the share (N, D) of each layer's inputs around each point.

    Each layer's range gets its part of the points, even if it is much narrower than the others.
    """
    ranges = dict.fromkeys((low, high) for low, high in (layer.grid()[[0, -1]].tolist() for layer in layers))
    points = max(_LEAST_POINTS, _POINTS // len(ranges))
    grid = torch.cat([torch.linspace(low, high, points, dtype=torch.float64) for low, high in ranges]).unique()
    # Each point stands for what lies nearer to it than to its neighbours.
    ends = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]).numpy() / 2, [np.inf]])
    return grid, torch.from_numpy(np.stack([np.diff(_distribution(layer, ends)) for layer in layers]))


def _distribution(layer: LearnedFunctions, x: np.ndarray) -> np.ndarray:
    """The share of a layer's inputs below each of x (D,), spread evenly around the points of its own grid."""
    points = layer.grid().numpy()
    density = layer.density.double().cpu().numpy()
    with np.errstate(invalid="ignore"):  # a density of zeros, as a damaged file may hold, gives NaN and is named later
        below = np.concatenate([[0.0], density.cumsum() / density.sum()])
    half = (points[1] - points[0]) / 2
    return np.interp(x, np.linspace(points[0] - half, points[-1] + half, len(below)), below)


def learned_subspace(
    layers: Sequence[LearnedFunctions], k: int = 4, change: Change = learned_change
) -> FunctionalSubspace:
    """The space spanned by the learned changes of all groups of all layers, each under its layer's own density.

    Of more than 2,048 functions a regular sample is taken, as the time for the space grows with their number.

    Args:
        layers: The adapted activations.
        k: The number of leading directions to keep.
        change: Gives the changes (G, D) of a layer's functions on a grid (D,); by default those it has learned.
    """
    grid, shares = common_grid(layers)
    changes = [change(layer, grid) for layer in layers]
    step = -(-sum(map(len, changes)) // _MOST_FUNCTIONS)
    changes = [values[::step] for values in changes]
    weights = [share.expand(len(change), -1) for share, change in zip(shares, changes, strict=True)]
    return functional_subspace(torch.cat(changes), torch.cat(weights), grid, k)
