"""A DataLoader that knows how far the training has read, and goes on from there.

Why not torchdata's StatefulDataLoader: its state is that of its worker processes, so a run saved with workers cannot go
on without them. Here the state is the epoch and a number of batches, for any `num_workers`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lit_adapters.errors import AdapterError


class ResumableLoader(DataLoader):
    """A `DataLoader` whose state is the epoch and the number of batches that were taken from it.

    Batches that workers have prefetched do not count. Lightning saves and loads the states of loaders that have them,
    so a run resumed in mid-epoch goes on with the next batch, and what it skips is not loaded. The order has to be a
    function of the epoch: give it an `EpochSampler`, or for datasets that are indexed by plain numbers
    `torch.utils.data.DistributedSampler(dataset, trainer.world_size, trainer.global_rank, seed=0)`, which is right for
    one process, too.

    Iterators begin to load at their first batch, so an epoch set between `iter` and `next` is respected. Where there
    are several iterators, the state is that of the one that was read last.

    Raises:
        AdapterError: The order would come from a random state (shuffle=True), or the dataset is an IterableDataset,
            which cannot skip.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.sampler, RandomSampler):
            raise AdapterError(
                "ResumableLoader cannot repeat the order of shuffle=True; give it sampler=DistributedSampler(dataset, "
                "trainer.world_size, trainer.global_rank, seed=0), whose order is a function of seed and epoch"
            )
        if isinstance(self.dataset, IterableDataset):
            raise AdapterError("ResumableLoader needs a dataset with indices; an IterableDataset cannot skip batches")
        self._remaining = _Remaining(super()._index_sampler)
        self._skip = 0
        self._position = (0, 0)  # epoch, batches taken

    @property
    def _index_sampler(self) -> Any:
        """Where torch's iterators, and `len`, look for the indices of batches."""
        return self.__dict__.get("_remaining") or super()._index_sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        return _Batches(self, skip)

    @property
    def epoch(self) -> int:
        """The sampler's epoch; 0 for one that has none."""
        return int(getattr(self.sampler, "epoch", getattr(self.batch_sampler, "epoch", 0)))

    def start(self, skip: int) -> Iterator[Any]:
        """A torch iterator over the batches of the present epoch, without the first `skip`."""
        self._remaining.skip = skip
        # In mid-epoch an iterator is an accident of resuming: what it draws for its workers must not shift the rest.
        with torch.random.fork_rng(devices=[]) if skip else contextlib.nullcontext():
            iterator = super().__iter__()
        self._remaining.skip = 0
        return iterator

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches taken in it, and batches it has."""
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches, "length": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator go on where `state_dict` was called.

        Raises:
            AdapterError: The epoch has another number of batches than it had then.
        """
        if state["length"] != len(self):
            raise AdapterError(
                f"the checkpoint was written in an epoch of {state['length']} batches, the data make {len(self)} now: "
                "resume with the same data, batch size and number of processes"
            )
        self._position, self._skip = (state["epoch"], state["batches"]), state["batches"]
        samplers: tuple[Any, ...] = (self.sampler, self.batch_sampler)
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(state["epoch"])


class _Remaining:
    """Batches of indices without the first `skip`; `len` counts them all."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler, self.skip = sampler, 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self.skip, None)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _Batches:
    """An iterator that starts late and counts."""

    def __init__(self, loader: ResumableLoader, skip: int) -> None:
        self._loader, self._taken = loader, skip
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._epoch = self._loader.epoch
            self._batches = self._loader.start(self._taken)
        batch = next(self._batches)
        self._taken += 1
        self._loader._position = (self._epoch, self._taken)
        return batch
