"""Views of a tensor as (outer, groups, elements of a group), whatever its rank and memory order."""

from __future__ import annotations

from math import prod

from torch import Tensor


def dense(x: Tensor, channel_dim: int) -> Tensor:
    """`x` itself where its channels are first or last in memory, otherwise a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(channel_dim, -1).is_contiguous() else x.contiguous()


def as_groups(x: Tensor, groups: int, channel_dim: int) -> Tensor:
    """View a `dense` tensor as (outer, groups, K): each row of K elements belongs to one group."""
    if not x.is_contiguous():
        x, channel_dim = x.movedim(channel_dim, -1), -1
    channel_dim %= x.ndim
    outer, inner = prod(x.shape[:channel_dim]), prod(x.shape[channel_dim + 1 :])
    return x.view(outer, groups, x.shape[channel_dim] // groups * inner)
