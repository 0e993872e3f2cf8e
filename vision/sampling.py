"""Which samples: seeded splits, class-balanced subsets, and the flips of every epoch.

Everything here is a pure function of its arguments and of a key such as (seed, epoch, sample index), which
torch.utils.data.random_split and timm's samplers are not: they read a random state. So nothing depends on the number of
worker processes, on what ran before, or on resuming.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_adapters.errors import DataError
from lit_adapters.lightning.resume.sampler import hash_key, permutation


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether sample `index` is mirrored in epoch `epoch`: a fair coin that belongs to (seed, epoch, index)."""
    return bool(hash_key("flip", seed, epoch, index) & 1)


def hold_out(labels: Tensor, fraction: float, classes: Sequence[str], *key: int | str) -> tuple[Tensor, Tensor]:
    """Split sample indices in two, class by class.

    Args:
        labels: Class index of each sample, shape (n,).
        fraction: Share of each class to hold out, in (0, 1); rounded, and at least one sample of each class present.
        classes: Class names, for messages.
        key: Seeds the choice.

    Returns:
        Kept and held-out indices, each sorted, shapes (n - h,) and (h,).

    Raises:
        DataError: A class has a single sample, or the fraction leaves nothing of it.
    """
    kept = []
    held = []
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


def balanced_subset(
    labels: Tensor, size: int, classes: Sequence[str], argument: str, *key: int | str, index: int = 0
) -> Tensor:
    """Choose `size` samples, equally many of each class (counts differ by at most one).

    The subsets of one key and size are disjoint, one for each `index`. With the same key, the first subset of a smaller
    size is contained in the first of a larger size.

    Args:
        labels: Class index of each sample, shape (n,).
        size: Number of samples to choose.
        classes: Class names; every class takes part.
        argument: What asked for it, such as `"train_subset=500"`, for messages.
        key: Seeds the choice.
        index: Which of the disjoint subsets.

    Returns:
        Chosen indices, sorted, shape (size,).

    Raises:
        DataError: A class has fewer samples than its share, or there are fewer subsets than `index` asks for.
    """
    # The classes take turns in having a sample more, so that subsets together are balanced too.
    turn = {int(label): place for place, label in enumerate(permutation(len(classes), "extra", *key))}
    members = [_shuffled_members(labels, label, *key) for label in range(len(classes))]

    def used(label: int, subsets: int) -> int:
        """How many samples of a class the first subsets have together."""
        share, extra = divmod(size, len(classes))
        return subsets * share - (turn[label] - subsets * extra) // len(classes)

    def lacking(subsets: int) -> int | None:
        """A class that has too few samples for that many subsets."""
        return next((label for label in range(len(classes)) if used(label, subsets) > len(members[label])), None)

    if (label := lacking(1)) is not None:
        raise DataError(
            f"{argument} needs {used(label, 1)} images of class {classes[label]!r}, but only {len(members[label])} are "
            "there (after the validation split, for training images): lower it"
        )
    if lacking(index + 1) is not None:
        there = next(subsets for subsets in itertools.count(1) if lacking(subsets + 1) is not None)
        raise DataError(
            f"subset_index={index} is too large: there are {there} disjoint subsets of {argument}, with indices from 0 "
            f"to {there - 1} (after the validation split): lower it, or choose smaller subsets"
        )
    chosen = [members[label][used(label, index) : used(label, index + 1)] for label in range(len(classes))]
    return torch.cat(chosen).sort().values


def _shuffled_members(labels: Tensor, label: int, *key: int | str) -> Tensor:
    members = (labels == label).nonzero().flatten()
    return members[permutation(len(members), "class", label, *key)]
