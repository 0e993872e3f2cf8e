"""Pairs with a loss of B A, in float64, and how optimisers train them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Pairs(nn.Module):
    """Layers W = s B A with targets; every batch of noise belongs to its step."""

    def __init__(self, *sizes: tuple[int, int, int], scale: float = 1.0, zero: bool = False, seed: int = 0) -> None:
        """Pairs of the sizes (out, in, r), with B at zero or not."""
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.scale = scale
        self.a = nn.ParameterList(random(r, i) / i**0.5 for _, i, r in sizes)
        self.b = nn.ParameterList(random(o, r) * (0.0 if zero else 1.0) for o, _, r in sizes)
        self.targets = [random(o, i) for o, i, _ in sizes]
        self.scales = [1.0 + random(o, i).abs() for o, i, _ in sizes]

    def weights(self) -> list[Tensor]:
        return [self.scale * b @ a for a, b in zip(self.a, self.b, strict=True)]

    def groups(self) -> list[dict[str, Any]]:
        factors = [p for a, b in zip(self.a, self.b, strict=True) for p in (a, b)]
        return [{"params": factors, "pairs": True, "scales": [self.scale] * len(self.a)}]

    def loss(self, step: int) -> Tensor:
        return loss(self.weights(), self.targets, self.scales, step)


def loss(weights: Iterable[Tensor], targets: Iterable[Tensor], scales: Iterable[Tensor], step: int) -> Tensor:
    """A weighted square loss, whose noise in the gradient differs from step to step."""
    draw = torch.Generator().manual_seed(1000 + step)
    total = torch.zeros((), dtype=torch.float64)
    for w, target, scale in zip(weights, targets, scales, strict=True):
        noise = torch.randn(w.shape, generator=draw, dtype=torch.float64).to(w)
        total = total + (scale * (w - target).square() + noise * w).mean()
    return total


def train(pairs: Pairs, optimizer: torch.optim.Optimizer, steps: range, factor: float = 1.0) -> list[list[Tensor]]:
    """The weights W after every step; the loss may be multiplied."""
    path = []
    for step in steps:
        optimizer.zero_grad()
        (factor * pairs.loss(step)).backward()
        optimizer.step()
        path.append([w.detach().clone() for w in pairs.weights()])
    return path


def distance(first: list[list[Tensor]], second: list[list[Tensor]]) -> float:
    """The largest relative distance of two paths, step by step and layer by layer."""
    both = zip(first, second, strict=True)
    return max(((a - b).norm() / b.norm()).item() for x, y in both for a, b in zip(x, y, strict=True))
