"""A shift and a gain for each group of the channels of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adapters.ops._context import transformed
from lit_adapters.ops.rational import rational

_FAST = (torch.float32, torch.bfloat16)


def group_affine(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    """(1 + gain) x + shift, computed in float32 (float64 for float64 inputs) and rounded once; exact where both are 0.

    A line is a rational function with Q = 1, so that the kernels of `rational` compute it in one pass over memory in
    each direction, and save `x` alone for backward. They turn an infinite `x` into NaN.

    Args:
        x: (..., D, ...) with D channels at `channel_dim`; any floating dtype.
        gain: One for each group of neighbouring channels (G,), float32. G must divide D.
        shift: As `gain`.
        channel_dim: The dimension of `x` that holds the channels.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if x.dtype not in _FAST or transformed():
        return group_affine_reference(x, gain, shift, channel_dim)
    line = torch.stack([shift, 1 + gain], dim=1)
    return rational(x, line, torch.zeros_like(line[:, :1]), channel_dim=channel_dim)


def group_affine_reference(x: Tensor, gain: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    """`group_affine` by the formula, differentiated by autograd."""
    wide = (1 + _per_channel(gain, x, channel_dim)) * x + _per_channel(shift, x, channel_dim)
    return wide.to(x.dtype)


def _per_channel(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The value of each channel (D,), in a shape that broadcasts with x."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return values.unsqueeze(-1).expand(-1, x.shape[channel_dim] // values.shape[0]).reshape(shape)
