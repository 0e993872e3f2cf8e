"""Which samples: seeded splits, class-balanced subsets, and the flips of every epoch.

Everything here is a pure function of its arguments and of a key such as (seed, epoch, sample index), which
torch.utils.data.random_split and timm's samplers are not: they read a random state. So nothing depends on the number of
worker processes, on what ran before, or on resuming; and a smaller subset is part of a larger one.
"""

from __future__ import annotations

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


def balanced_subset(labels: Tensor, size: int, classes: Sequence[str], argument: str, *key: int | str) -> Tensor:
    """Choose `size` samples, equally many of each class (counts differ by at most one).

    With the same key a smaller subset is contained in a larger one.

    Args:
        labels: Class index of each sample, shape (n,).
        size: Number of samples to choose.
        classes: Class names; every class takes part.
        argument: What asked for it, such as `"train_subset=500"`, for messages.
        key: Seeds the choice.

    Returns:
        Chosen indices, sorted, shape (size,).

    Raises:
        DataError: A class has fewer samples than its share.
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
