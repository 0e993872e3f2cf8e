"""Which samples, and in which order: seeded splits, class-balanced subsets, the order of every epoch and its flips.

Everything here is a pure function of its arguments and of a key such as (seed, epoch, sample index). Nothing reads a
global random state, so results do not depend on worker processes, on what ran before, or on resuming.
"""

import hashlib
from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_adapters.errors import DataError


def hash_key(*key: int | str) -> int:
    """A well-mixed 63-bit integer that depends on the key alone, on every platform and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def permutation(n: int, *key: int | str) -> Tensor:
    """The permutation of 0..n-1, shape (n,), that belongs to the key."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash_key(*key)))


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether sample ``index`` is mirrored in epoch ``epoch``: a fair coin that belongs to (seed, epoch, index)."""
    return bool(hash_key("flip", seed, epoch, index) & 1)


def hold_out(labels: Tensor, fraction: float, classes: Sequence[str], *key: int | str) -> tuple[Tensor, Tensor]:
    """Split sample indices in two, class by class.

    Args:
        labels: Class index of each sample, shape (n,).
        fraction: Share of each class to hold out, in (0, 1); rounded, and at least one sample of each class present.
        classes: Class names, for messages.
        key: Seeds the choice.

    Returns:
        Kept and held-out indices, each sorted.

    Raises:
        DataError: If a class has a single sample or the fraction leaves nothing of it.
    """
    kept, held = [], []
    for label in labels.unique().tolist():
        members = _shuffled_members(labels, label, *key)
        count = max(1, round(len(members) * fraction))
        if count >= len(members):
            raise DataError(
                f"holding out {fraction} of class {classes[label]!r} ({len(members)} images) leaves none to train on: "
                "add images to that class or lower val_fraction"
            )
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def balanced_subset(labels: Tensor, size: int, classes: Sequence[str], argument: str, *key: int | str) -> Tensor:
    """Choose ``size`` samples, equally many of each class (counts differ by at most one).

    With the same key a smaller subset is contained in a larger one.

    Args:
        labels: Class index of each sample, shape (n,).
        size: Number of samples to choose.
        classes: Class names; every class takes part.
        argument: What asked for it, such as ``"train_subset=500"``, for messages.
        key: Seeds the choice.

    Returns:
        Chosen indices, sorted, shape (size,).

    Raises:
        DataError: If a class has fewer samples than its share.
    """
    share, extra = divmod(size, len(classes))
    with_extra = set(permutation(len(classes), "extra", *key)[:extra].tolist())
    chosen = []
    for label, name in enumerate(classes):
        count = share + (label in with_extra)
        members = _shuffled_members(labels, label, *key)
        if count > len(members):
            raise DataError(
                f"{argument} needs {count} images of class {name!r}, but only {len(members)} are there "
                "(after the validation split, for training images): lower it"
            )
        chosen.append(members[:count])
    return torch.cat(chosen).sort().values


def _shuffled_members(labels: Tensor, label: int, *key: int | str) -> Tensor:
    members = (labels == label).nonzero().flatten()
    return members[permutation(len(members), "class", label, *key)]


class EpochSampler(DistributedSampler):
    """Yields (epoch, index) pairs in the order that belongs to (seed, epoch).

    The epoch travels with each index, so worker processes (persistent ones too) know it. Lightning calls
    ``set_epoch`` before every epoch and leaves a ``DistributedSampler`` in place; a plain sampler it would wrap,
    and the wrapper does not pass the epoch on. With several replicas each takes every ``num_replicas``-th sample,
    the order being padded from its start so that all replicas draw equally many.

    Args:
        dataset: The data set; only its length is used.
        seed: Seeds the orders.
        num_replicas: Number of processes that share an epoch.
        rank: This process's place among them.
    """

    def __init__(self, dataset: Sized, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = permutation(len(self.dataset), "order", self.seed, self.epoch)  # type: ignore[arg-type]
        padded = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        epoch = self.epoch
        return iter([(epoch, index) for index in padded[self.rank :: self.num_replicas].tolist()])
