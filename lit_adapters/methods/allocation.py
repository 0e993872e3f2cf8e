"""Rank allocation: a training gives up directions of low-rank updates, over all layers together, to meet a budget.

A method that does this gives its adapters one `Allocation` in common. The training makes an `Allocator` of it, which
sees the gradients of every optimiser step; `lit_adapters.training.rank_allocation` calls it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.methods.description import AdapterSummary, each_layer, mean_over_layers

RANK_CHARTS = {
    "rank, mean over layers": mean_over_layers("rank"),
    "rank, each layer": each_layer("rank"),
}


class Allocator(ABC):
    """Allocates the ranks of some layers while they train.

    Attributes:
        finished: Whether the ranks are final.
    """

    finished: bool = False

    @abstractmethod
    def start(self, total_steps: float) -> None:
        """Fix the schedule.

        Args:
            total_steps: Optimiser steps of the whole training; infinite or negative if it has no known end.

        Raises:
            AdapterError: The schedule needs to know the end of the training, or does not fit into it.
        """

    @abstractmethod
    def update(self, step: int) -> None:
        """Look at the gradients of an optimiser step that has just been made, and give up directions if it is time.

        Args:
            step: Optimiser steps that are done, this one included.

        Raises:
            AdapterError: A parameter has no gradient.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            AdapterError: It belongs to other layers.
        """


class Allocation(ABC):
    """The settings that the layers of one method share.

    Layers with one and the same object are allocated together, so each `attach` needs an object of its own.

    Attributes:
        orthogonality: The factor of the penalty that keeps the factors of the updates orthogonal.
        needs_whole: Why the layers must not be sharded, with what to do instead; empty if they may be.
    """

    orthogonality: float
    needs_whole: ClassVar[str] = ""

    @abstractmethod
    def allocator(self, layers: Mapping[str, Any]) -> Allocator:
        """A new allocator.

        Args:
            layers: The method's adapters by their names in the module that trains.

        Raises:
            AdapterError: The settings leave nothing to allocate, or the method cannot be trained here.
        """


class Allocated:
    """The part of an adapter that knows which directions of its update are left.

    Attributes:
        kept: The directions that an allocator kept last; None before the first time.
    """

    kept: list[bool] | None = None

    def direction_values(self) -> Tensor | None:
        """One singular value for each direction, of any shape with r elements; None if no directions are given up."""
        raise NotImplementedError

    def kept_directions(self) -> list[bool] | None:
        """As for any adapter. A layer that was loaded tells it by its singular values, unless all of them are 0."""
        values = self.direction_values()
        if values is None:
            return None
        if self.kept is not None or values.is_meta:
            return self.kept
        kept: list[bool] = (whole(values.detach()).flatten() != 0).tolist()
        return kept if any(kept) else None

    def drop_directions(self, kept: list[bool]) -> None:
        """Set the singular values of some directions to 0.

        Args:
            kept: For each of the r directions, whether it stays.
        """
        values = self.direction_values()
        assert values is not None
        self.kept = kept
        dropped = ~torch.tensor(kept, device=values.device).view(values.shape)
        write(values, whole(values.detach()).masked_fill(dropped, 0.0))

    def rank_statistic(self) -> dict[str, float]:
        """rank: The number of directions that are kept."""
        values, kept = self.direction_values(), self.kept_directions()
        if values is None:
            return {}
        return {"rank": float(values.shape[0] if kept is None else sum(kept))}

    def with_rank(self, summary: AdapterSummary) -> AdapterSummary:
        """A summary with a note of the rank, if this is known."""
        kept = self.kept_directions()
        return summary if kept is None else dataclasses.replace(summary, note=f"rank {sum(kept)} of {len(kept)}")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has sharded, which every process has to ask for; any other as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


@torch.no_grad()
def write(target: Tensor, values: Tensor) -> None:
    """Write whole values, the same in every process, into a tensor that may be sharded."""
    if not hasattr(target, "full_tensor"):
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    target.to_local().copy_(distribute_tensor(values, target.device_mesh, target.placements).to_local())


def deviation(factor: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """How far the rows of a matrix, or its columns, are from being orthonormal.

    Args:
        factor: P (n, m).
        rows: Whether rows are meant.

    Returns:
        D, which is P P^T - I (n, n) for rows and P^T P - I (m, m) for columns; and its Frobenius norm.
    """
    gram = factor @ factor.T if rows else factor.T @ factor
    gram.diagonal().sub_(1)
    return gram, torch.linalg.vector_norm(gram)


@torch.no_grad()
def add_orthogonality_gradient(factors: list[tuple[nn.Parameter, bool]], weight: float) -> None:
    """Add the gradient of weight * mean ||P P^T - I||_F to the gradients of matrices P.

    That of ||D||_F is 2 D P / ||D||_F; where D is 0 it is 0. Parameters without a gradient are left out, as their step
    changes nothing.

    Args:
        factors: Each P with True if its rows are to be orthonormal, False for its columns.
        weight: The factor of the penalty.
    """
    for parameter, rows in factors:
        if parameter.grad is None:
            continue
        factor, gradient = whole(parameter), whole(parameter.grad)
        d, norm = deviation(factor, rows)
        scale = 2 * weight / (len(factors) * norm.clamp(min=torch.finfo(norm.dtype).tiny))
        write(parameter.grad, gradient + scale * (d @ factor if rows else factor @ d))
