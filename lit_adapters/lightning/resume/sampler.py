"""Data order as a pure function of (seed, epoch): hashed keys, their permutations, and the sampler built on them.

Nothing here reads a global random state, so an order does not depend on worker processes, on what ran before, or on
resuming. Why not torch's DistributedSampler alone: it does not tell the dataset the epoch, of which augmentation in a
worker process has to be a function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def hash_key(*key: int | str) -> int:
    """A well-mixed 63-bit integer that depends on the key alone, on every platform and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def permutation(n: int, *key: int | str) -> Tensor:
    """The permutation of 0..n-1, shape (n,), that belongs to the key."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash_key(*key)))


class EpochSampler(DistributedSampler):
    """Yields (epoch, index) pairs in the order that belongs to (seed, epoch).

    The epoch travels with each index, so worker processes (persistent ones too) know it. Lightning calls
    `set_epoch` before every epoch and leaves a `DistributedSampler` in place; a plain sampler it would wrap,
    and the wrapper does not pass the epoch on. With several replicas each takes every `num_replicas`-th sample,
    the order being padded from its start so that all replicas draw equally many.

    Args:
        dataset: The data set; only its length is used.
        seed: Seeds the orders.
        num_replicas: Number of processes that share an epoch.
        rank: This process's place among them.
    """

    def __init__(self, dataset: Sized, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def order(self) -> Tensor:
        """All sample indices in the order of the present epoch, before replicas share them."""
        return permutation(len(self.dataset), "order", self.seed, self.epoch)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.order()
        padded = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return _pairs(self.epoch, padded[self.rank :: self.num_replicas])


def _pairs(epoch: int, order: Tensor) -> Iterator[tuple[int, int]]:
    """(epoch, index) pairs. Only few are there at a time: millions of them would fill the memory."""
    for chunk in order.split(1 << 16):
        for index in chunk.tolist():
            yield epoch, index
