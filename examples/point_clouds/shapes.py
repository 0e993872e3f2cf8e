"""Point clouds of generated shapes: points on simple surfaces, stretched, rotated and noisy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

# Each takes uniform numbers (N, 3) in [0, 1) and gives points (N, 3) on a surface.
Surface = Callable[[Tensor], Tensor]


def _around(angle: Tensor, radius: Tensor, height: Tensor) -> Tensor:
    """Points at a radius and a height around the vertical axis; `angle` counts turns."""
    turn = 2 * math.pi * angle
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height], dim=-1)


def _sphere(u: Tensor) -> Tensor:
    height = 2 * u[:, 1] - 1
    return _around(u[:, 0], (1 - height.square()).clamp_min(0).sqrt(), height)


def _box(u: Tensor) -> Tensor:
    points = 2 * u - 1
    face = torch.arange(len(u)) % 6
    points[torch.arange(len(u)), face // 2] = (2 * (face % 2) - 1).to(u)
    return points


def _torus(u: Tensor) -> Tensor:
    turn = 2 * math.pi * u[:, 1]
    return _around(u[:, 0], 1 + 0.35 * turn.cos(), 0.35 * turn.sin())


def _tube(u: Tensor) -> Tensor:
    return _around(u[:, 0], torch.full_like(u[:, 0], 0.7), 2 * u[:, 1] - 1)


def _cone(u: Tensor) -> Tensor:
    radius = u[:, 1].sqrt()
    return _around(u[:, 0], radius, 1 - 2 * radius)


def _disc(u: Tensor) -> Tensor:
    return _around(u[:, 0], u[:, 1].sqrt(), torch.zeros_like(u[:, 0]))


def _bowl(u: Tensor) -> Tensor:
    points = _sphere(u)
    return torch.cat([points[:, :2], -points[:, 2:].abs()], dim=1)


def _hourglass(u: Tensor) -> Tensor:
    height = (2 * u[:, 1] - 1).sign() * (2 * u[:, 1] - 1).abs().sqrt()
    return _around(u[:, 0], height.abs(), height)


def _spiral(u: Tensor) -> Tensor:
    return _around(2 * u[:, 0], torch.full_like(u[:, 0], 0.8), 2 * u[:, 0] - 1) + 0.15 * _sphere(u[:, 1:].roll(1, 1))


def _link(u: Tensor) -> Tensor:
    """Two rings, one through the other."""
    points = 0.7 * _torus(u)
    second = points[:, [0, 2, 1]] + torch.tensor([0.7, 0.0, 0.0]).to(u)
    return torch.where((torch.arange(len(u)) % 2 == 0)[:, None], points, second)


def _saddle(u: Tensor) -> Tensor:
    flat = 2 * u[:, :2] - 1
    return torch.cat([flat, (flat[:, :1].square() - flat[:, 1:].square())], dim=1)


def _cross(u: Tensor) -> Tensor:
    """Three bars at right angles."""
    bars = _box(u) * torch.tensor([1.0, 0.2, 0.2]).to(u)
    axis = torch.arange(len(u)) // 6 % 3
    return torch.stack([bars.roll(shift, dims=1) for shift in range(3)])[axis, torch.arange(len(u))]


# What the transformer is pretrained on, and what it is adapted to.
PRETRAINING: dict[str, Surface] = {
    "sphere": _sphere,
    "box": _box,
    "torus": _torus,
    "tube": _tube,
    "cone": _cone,
    "disc": _disc,
}
ADAPTATION: dict[str, Surface] = {
    "bowl": _bowl,
    "hourglass": _hourglass,
    "spiral": _spiral,
    "link": _link,
    "saddle": _saddle,
    "cross": _cross,
}


def _rotations(count: int, generator: torch.Generator) -> Tensor:
    """Rotations (count, 3, 3), uniform over all."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q


def clouds(
    surfaces: Sequence[Surface], each: int, points: int, seed: int, noise: float = 0.0, rotated: bool = False
) -> TensorDataset:
    """Clouds (len(surfaces) * each, points, 3) with the index of their surface as label.

    Every cloud is stretched along each axis by a factor in [0.6, 1.4], then rotated, made noisy, centred, and scaled so
    that its farthest point is at distance 1.

    Args:
        surfaces: The shapes.
        each: The number of clouds of each shape.
        points: The number of points of a cloud.
        seed: Of the random numbers.
        noise: The standard deviation of normal noise, in units of the shape before it is scaled.
        rotated: Whether clouds are turned about any axis; by default they stand upright.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(surfaces)).repeat_interleave(each)
    uniform = torch.rand(len(labels), points, 3, generator=generator)
    positions = torch.stack([surfaces[int(label)](u) for label, u in zip(labels, uniform, strict=True)])
    positions = positions * (0.6 + 0.8 * torch.rand(len(labels), 1, 3, generator=generator))
    if rotated:
        positions = positions @ _rotations(len(labels), generator)
    positions = positions + noise * torch.randn(positions.shape, generator=generator)
    positions = positions - positions.mean(dim=1, keepdim=True)
    return TensorDataset(positions / positions.norm(dim=-1, keepdim=True).amax(dim=1, keepdim=True), labels)
