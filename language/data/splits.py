"""Which rows belong to which split: pure functions of the rows and a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from language.data.formats import Record
from lit_adapters.errors import DataError
from lit_adapters.lightning.resume.sampler import permutation

T = TypeVar("T")


def hold_out(records: list[Record], fractions: Mapping[str, float], seed: int) -> dict[str, list[Record]]:
    """Share records among splits, equal prompts together; each split keeps the rows' order.

    The splits take prompts one after the other, in a random order, each until it has at least its share.

    Args:
        records: All rows.
        fractions: Share of the rows by split; what remains is `train`.
        seed: Seeds the order.

    Returns:
        The records of each split of `fractions`, and of `train`.

    Raises:
        DataError: Nothing remains to train on.
    """
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.prompt_key, []).append(i)
    waiting = list(groups.values())
    order = iter([waiting[i] for i in permutation(len(waiting), "hold out", seed).tolist()])
    chosen: dict[str, list[int]] = {}
    for split, fraction in fractions.items():
        chosen[split] = []
        while len(chosen[split]) < fraction * len(records) and (group := next(order, None)):
            chosen[split] += group
    chosen["train"] = [i for group in order for i in group]
    if not chosen["train"]:
        raise DataError(
            f"holding out {dict(fractions)} of {len(groups)} different prompts leaves none to train on: "
            "lower the fractions"
        )
    return {split: [records[i] for i in sorted(indices)] for split, indices in chosen.items()}


def subset(items: Sequence[T], size: int | None, *key: int | str, index: int = 0) -> list[T]:
    """`size` items chosen at random, in their own order; all where there are fewer, or where `size` is None.

    The choice is a pure function of (len(items), key, index). With the same key, choices with different indices have
    no item in common, and with index 0 a smaller choice is contained in a larger one.

    Raises:
        DataError: `size` is below 1.
    """
    if size is None:
        return list(items)
    if size < 1:
        raise DataError(f"a choice of {size} rows is empty: ask for at least 1")
    chosen = permutation(len(items), *key)[index * size : (index + 1) * size].sort().values
    return [items[i] for i in chosen.tolist()]
