"""The sides of low-rank pairs, in batches, and the base of optimisers that move the product B A.

A side is a factor that trains, with its partner. Both are written with the rank last, so that B and A are alike:

    the side of B: X = B (n = out, r), Y = A^T (m = in, r)        W  = W0   + s X Y^T
    the side of A: X = A^T (n = in, r), Y = B (m = out, r)        W^T = W0^T + s X Y^T

Sides of equal sizes and equal age are stacked, so that one call of QR or of an eigendecomposition serves many layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_adapters.errors import NotFiniteError
from lit_adapters.optimizers.base import ADAMW_EPS, working_dtype
from lit_adapters.optimizers.pair_optimizer import PairOptimizer, pairs_of
from lit_adapters.values import check_number


class Side(NamedTuple):
    """A factor that trains and its partner.

    Attributes:
        factor: A (r, in) or B (out, r).
        partner: The other one, which may be frozen.
        is_a: Whether `factor` is A.
        scale: s, the factor on B A.
        turns: Whether the partner trains in this step too, so that the two may take turns.
    """

    factor: Tensor
    partner: Tensor
    is_a: bool
    scale: float
    turns: bool


@dataclass
class Batch:
    """Sides of equal sizes and equal age; k of them.

    Attributes:
        sides: The sides.
        group: Their group of parameters.
        step: The number of this step of the factors, from 1; equal for all.
        turn: The number of this step of B, from 1: both factors tell from it whose turn it is. A factor that
            was frozen for a while has fewer steps than the other one.
        x: The factors X, (k, n, r).
        y: The partners Y, (k, m, r).
        gradient: The gradients of X, (k, n, r).
        scale: s of each side, (k, 1, 1).
        work: What an optimiser keeps from `prepare` to `apply`.
    """

    sides: Sequence[Side]
    group: dict[str, Any]
    step: int
    turn: int
    x: Tensor
    y: Tensor
    gradient: Tensor
    scale: Tensor
    work: dict[str, Tensor] = field(default_factory=dict)


class ProductOptimizer(PairOptimizer):
    """The base of optimisers whose step is a function of the product B A, whatever the two factors of it are.

    Clipping is done inside: the norms of gA and gB depend on how the product is factored, and the norm of what the pair
    passes on of the full gradient does not. All layers, and the gradients of all other parameters, count together.

    Args:
        params: Groups, at least one of them with pairs.
        defaults: As for `AdapterOptimizer`, and "clip": the largest norm that is let through; None clips nothing.

    Raises:
        AdapterError: A setting is out of range, or no group has pairs.
    """

    largest_batch = 1 << 40  # numbers in the k matrices (n, m) or (n, r^2) of a batch, for optimisers that form these

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_number("eps", defaults["eps"], 0.0)
        if defaults["clip"] is not None:
            check_number("clip", defaults["clip"], 1e-12)
        super().__init__(params, defaults)

    def prepare(self, batch: Batch) -> Tensor:
        """Read parameters and gradients, and change nothing yet.

        Returns:
            The square of the norm of the gradients that the batch passes on, a scalar.
        """
        raise NotImplementedError

    def apply(self, batch: Batch, shrink: Tensor | None) -> Tensor | None:
        """Move states on.

        Args:
            batch: As `prepare` left it.
            shrink: The factor on all gradients by which they are clipped; None for 1.

        Returns:
            The new factors X, (k, n, r); None if they stay.
        """
        raise NotImplementedError

    def update(self) -> None:
        """Prepare all sides from the same parameters, clip, then write.

        Raises:
            NotFiniteError: A decomposition failed, as a parameter or a gradient is not finite.
        """
        try:
            self._update()
        except torch.linalg.LinAlgError as error:
            raise NotFiniteError(
                f"{type(self).__name__}: a factor of a low-rank pair or its gradient is not finite ({error}); lower "
                "the learning rate, set clip, or check the loss before the step"
            ) from error

    def _update(self) -> None:
        batches = [batch for group in self.param_groups if group["pairs"] for batch in self._batches(group)]
        others = [group for group in self.param_groups if not group["pairs"]]
        squares = [self.prepare(batch) for batch in batches]
        shrink = None
        clip = self.defaults["clip"]
        if clip is not None:
            gradients = [p.grad for group in others for p in group["params"] if p.grad is not None]
            squares += [gradient.float().square().sum() for gradient in gradients]
            if not squares:
                return
            norm = torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()
            shrink = (clip / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
            for gradient in gradients:
                gradient.mul_(shrink.to(gradient))
        for batch in batches:
            written = self.apply(batch, None if shrink is None else shrink.to(batch.x))
            for index, side in enumerate(batch.sides):
                self.state[side.factor]["step"] += 1
                if written is not None:
                    side.factor.copy_(_rows(written[index], side.is_a))
        for group in others:
            self.adamw(group["params"], group, group["lr"], ADAMW_EPS)

    def _batches(self, group: dict[str, Any]) -> Iterator[Batch]:
        """The sides of a group that have a gradient, in batches."""
        alike: dict[tuple[Any, ...], list[Side]] = {}
        for side in _sides(group):
            step = self._steps(side.factor)
            turn = self._steps(side.partner) if side.is_a and side.turns else step
            sizes = (*_rows(side.factor, side.is_a).shape, len(_rows(side.partner, not side.is_a)))
            key = (*sizes, side.factor.dtype, side.factor.device, side.is_a, side.turns, step, turn)
            alike.setdefault(key, []).append(side)
        for (n, rank, m, *_, step, turn), sides in alike.items():
            most = max(1, self.largest_batch // (n * max(m, rank**2)))
            for start in range(0, len(sides), most):
                yield _batch(sides[start : start + most], group, step + 1, turn + 1)

    def _steps(self, factor: Tensor) -> int:
        """How many steps a factor has taken."""
        state = self.state[factor]
        if not state:
            state["step"] = torch.zeros(())
        return int(state["step"])

    def side_shapes(self, n: int, m: int, rank: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """What is kept of a side beside its step: shapes by name.

        Args:
            n: The rows of X.
            m: The rows of Y.
            rank: r.
            group: The group of the side.
        """
        raise NotImplementedError

    def state_shapes(self, group: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
        """As for every optimiser; first A and then B of each pair."""
        if not group["pairs"]:
            return super().state_shapes(group)
        shapes: list[dict[str, tuple[int, ...]]] = []
        for a, b, _ in pairs_of(group):
            for n, m in ((a.shape[1], b.shape[0]), (b.shape[0], a.shape[1])):
                shapes.append({"step": ()} | self.side_shapes(n, m, len(a), group))
        return shapes

    def kept(self, batch: Batch, name: str) -> Tensor:
        """A state of all sides of a batch, (k, ...)."""
        return torch.stack([self.state[side.factor][name] for side in batch.sides])

    def keep(self, batch: Batch, name: str, values: Tensor) -> None:
        """Store a state of all sides of a batch, (k, ...), each in memory of its own."""
        for side, value in zip(batch.sides, values, strict=True):
            state = self.state[side.factor]
            if name in state:
                state[name].copy_(value)
            else:
                state[name] = value.clone(memory_format=torch.contiguous_format)


def _sides(group: dict[str, Any]) -> Iterator[Side]:
    for a, b, scale in pairs_of(group):
        a_trains, b_trains = (factor.requires_grad and factor.grad is not None for factor in (a, b))
        if b_trains:
            yield Side(b, a, False, scale, a_trains)
        if a_trains:
            yield Side(a, b, True, scale, b_trains)


def _rows(factor: Tensor, is_a: bool) -> Tensor:
    return factor.mT if is_a else factor


def _batch(sides: Sequence[Side], group: dict[str, Any], step: int, turn: int) -> Batch:
    dtype = working_dtype(sides[0].factor)
    gradients = [_rows(side.factor.grad, side.is_a).to(dtype) for side in sides]  # type: ignore[arg-type]
    return Batch(
        sides,
        group,
        step,
        turn,
        x=torch.stack([_rows(side.factor, side.is_a).to(dtype) for side in sides]),
        y=torch.stack([_rows(side.partner, not side.is_a).to(dtype) for side in sides]),
        gradient=torch.stack(gradients),
        scale=torch.tensor([side.scale for side in sides], dtype=dtype, device=sides[0].factor.device)[:, None, None],
    )
