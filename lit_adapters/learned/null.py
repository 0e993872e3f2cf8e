"""Random updates to compare learned functions with: what would the space look like if training had no direction?

The functions of a rational activation have few coefficients with overlapping effects, and some groups move more than
others. Both alone make the space of their changes low-dimensional. So each random update keeps what is not the
direction: the rank of the update, and the norm of each group's change of numerator and of denominator, with each
coefficient in units of its effect on the function (its learning scale).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.ops.statistics import effective_rank


def random_change(layer: NoRAActivation, x: Tensor, generator: torch.Generator) -> Tensor:
    """The change of each function by a random update of the learned rank and group norms: (G, D), float64.

    Args:
        layer: The adapted activation.
        x: The inputs (D,).
        generator: Of the random numbers.
    """
    updated = []
    for part, current, start in zip(
        ("numerator", "denominator"), layer.coefficients(), layer.base_coefficients(), strict=True
    ):
        scale = getattr(layer, f"{part}_scale").detach().double().cpu()
        start = start.detach().double().cpu()
        learned = (current.detach().double().cpu() - start) / scale
        drawn = _drawn(learned, layer.config.rank, generator)
        kept = learned.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        updated.append(start + drawn * kept * scale)
    return layer.learned_change(x, (updated[0], updated[1]))


def _drawn(like: Tensor, rank: int | None, generator: torch.Generator) -> Tensor:
    """Gaussian values in the shape of `like`, (G, k): free, or of a rank."""
    groups, coefficients = like.shape
    if rank is None:
        return torch.randn(groups, coefficients, generator=generator, dtype=torch.float64)
    left = torch.randn(groups, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, coefficients, generator=generator, dtype=torch.float64)


def ranks_against_random(layers: Sequence[NoRAActivation], draws: int = 20, seed: int = 0) -> tuple[float, list[float]]:
    """The effective rank of the learned changes of all layers, and that of `draws` random updates.

    Args:
        layers: The adapted activations, at least one of which has learned something.
        draws: Number of random updates.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    learned = effective_rank(learned_subspace(layers).singular_values)
    random = [
        effective_rank(
            learned_subspace(layers, change=lambda layer, x: random_change(layer, x, generator)).singular_values  # type: ignore[arg-type]
        )
        for _ in range(draws)
    ]
    return learned, random
