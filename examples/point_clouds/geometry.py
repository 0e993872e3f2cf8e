"""Farthest points and nearest neighbours in plain PyTorch; no CUDA extension."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.methods.token_selection import take


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Indices (batch, count) of points that are far from each other: each next one is the farthest from those before.

    The first one is the farthest from the mean, so that the order of the points does not matter.

    Args:
        points: Positions (batch, N, 3).
        count: How many to choose, at most N.
    """
    chosen = []
    current = (points - points.mean(dim=1, keepdim=True)).square().sum(-1).argmax(dim=1)
    distance = points.new_full(points.shape[:2], torch.inf)  # squared, to the nearest chosen point
    for _ in range(count):
        chosen.append(current)
        position = take(points, current[:, None])
        distance = torch.minimum(distance, (points - position).square().sum(-1))
        current = distance.argmax(dim=1)
    return torch.stack(chosen, dim=1)


def nearest_points(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Indices (batch, centres, count) of the points nearest to each centre, the nearest first.

    Args:
        points: Positions (batch, N, 3).
        centres: Positions (batch, centres, 3).
        count: How many for each centre, at most N.
    """
    # Without matrix products, whose rounding would decide between near points.
    distance = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(count, dim=-1, largest=False).indices


def group(points: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Patches of a cloud: farthest points, each with its nearest points.

    Args:
        points: Positions (batch, N, 3).
        groups: The number of patches.
        size: The number of points of a patch.

    Returns:
        The centres (batch, groups, 3), and the points relative to their centre (batch, groups, size, 3).
    """
    centres = take(points, farthest_points(points, groups))
    indices = nearest_points(points, centres, size)
    patches = take(points, indices.flatten(1)).unflatten(1, (groups, size))
    return centres, patches - centres[:, :, None]
