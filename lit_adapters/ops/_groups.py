"""Views of a tensor as (outer, groups, elements of a group), for any rank and memory order."""

from __future__ import annotations

from math import prod

from torch import Tensor


def dense(x: Tensor, channel_dim: int) -> Tensor:
    """`x` itself where its channels are first or last in memory, otherwise a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(channel_dim, -1).is_contiguous() else x.contiguous()


def grouped_shape(x: Tensor, groups: int, channel_dim: int) -> tuple[int, int, int]:
    """The shape (outer, groups, K) of a `dense` tensor; the K elements of a row belong to one group."""
    channels = x.shape[channel_dim]
    if not x.is_contiguous():  # the channels are last in memory
        return prod(x.shape) // max(1, channels), groups, channels // groups
    channel_dim %= x.ndim
    outer, inner = prod(x.shape[:channel_dim]), prod(x.shape[channel_dim + 1 :])
    return outer, groups, channels // groups * inner


def as_groups(x: Tensor, groups: int, channel_dim: int) -> Tensor:
    """A view of a `dense` tensor in the shape of `grouped_shape`."""
    shape = grouped_shape(x, groups, channel_dim)
    return (x if x.is_contiguous() else x.movedim(channel_dim, -1)).view(shape)
