"""Plain DataLoaders that go on in mid-epoch: the indices of the batches that were read are passed over.

This works where the order can be known: it is fixed, a function of the epoch, or made of torch's random numbers. Their
state at the start of the epoch is kept. Skipped batches are not loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_adapters.errors import AdapterError

_KNOWN = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


class FollowedLoader(DataLoader):
    """The class that `follow` puts before the class of a user's DataLoader."""

    followed: Followed

    @property
    def _index_sampler(self) -> Any:
        """Where torch's iterators, and `len`, look for the indices of batches."""
        self.followed.sampler = super()._index_sampler
        return self.followed


class Followed:
    """Batches of indices of one loader, and the random states from which their order comes.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.sampler: Any = ()
        self._loader = loader
        self._start: dict[str, Any] | None = None  # the states at the first batch of the epoch
        self._resumed: dict[str, Any] | None = None  # the state to go on from
        self._skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        sampler = self.sampler
        if self._resumed is None:
            self._start = {"torch": torch.get_rng_state(), "generators": _states(self._loader)}
            yield from sampler
            return
        self._start, present = self._resumed["start"], self._resumed["generators"]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._start["torch"].cpu())
            _set_states(self._loader, self._start["generators"])
            batches = iter(sampler)
            passed = sum(1 for _ in itertools.islice(batches, self._skip))
        assert passed == self._skip
        if self._loader.num_workers == 0:  # workers have been sent indices beyond the batches that were read
            _set_states(self._loader, present)
        yield from batches
        self._resumed = None  # a loader that is repeated begins its next pass with the first batch

    def state_dict(self) -> dict[str, Any]:
        """The states at the start of the epoch and now, and the number of batches, in plain values and tensors."""
        if self._start is None and self._resumed is not None:  # nothing was read since the resume
            return self._resumed
        return {"start": self._start, "generators": _states(self._loader), "length": len(self._loader)}

    def go_on(self, state: dict[str, Any], batches: int, epoch: int) -> None:
        """Let iterators begin after a number of batches, until `start_anew`.

        Args:
            state: What `state_dict` returned.
            batches: How many batches of the epoch were read.
            epoch: For samplers whose order is a function of it.
        """
        for sampler in _samplers(self._loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        self._resumed, self._skip = state, batches

    def check_length(self, state: dict[str, Any]) -> None:
        """Check that the epoch that was broken off is as long as it was.

        Raises:
            AdapterError: The epoch has another number of batches than it had then.
        """
        if state["length"] != len(self._loader):
            raise AdapterError(
                f"the checkpoint was written in an epoch of {state['length']} batches, the data make "
                f"{len(self._loader)} now: resume with the same data, batch size and number of processes"
            )

    def start_anew(self) -> None:
        """Let the next iterators begin with the first batch."""
        self._resumed = None

    def set_generators(self, state: dict[str, Any]) -> None:
        """Give the loader's own generators the states that they had."""
        _set_states(self._loader, state["generators"])


def follow(loader: Any) -> Any:
    """Let a loader note what its order comes from, if that can be known; returns this loader, changed in place."""
    if isinstance(loader, FollowedLoader):
        loader.followed = Followed(loader)
    elif _order_is_known(loader):
        kind = type(loader)
        loader.__class__ = type(kind.__name__, (FollowedLoader, kind), {"__module__": kind.__module__})
        loader.followed = Followed(loader)
    return loader


class FollowingLoaders:
    """A strategy's `process_dataloader` that also follows each loader.

    Args:
        process: The strategy's own.
    """

    def __init__(self, process: Any) -> None:
        self._process = process

    def __call__(self, loader: Any) -> Any:
        return follow(self._process(loader))


def _order_is_known(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or hasattr(loader, "state_dict"):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__ or isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    if isinstance(batches, Sequence):
        return True
    known_batches = batches is None or type(batches) is BatchSampler
    order = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return known_batches and (isinstance(order, Sequence) or type(order) in _KNOWN)


def _samplers(loader: DataLoader) -> list[Any]:
    return [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]


def _generators(loader: DataLoader) -> list[Generator]:
    found = [loader.generator, *(getattr(sampler, "generator", None) for sampler in _samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, Generator)}.values())


def generators(loaders: Any) -> list[Generator]:
    """The generators of their own that loaders and their samplers have, of one loader or any nesting of them."""
    found = [g for loader in tree_leaves(loaders) if isinstance(loader, DataLoader) for g in _generators(loader)]
    return list({id(g): g for g in found}.values())


def _states(loader: DataLoader) -> list[Tensor]:
    return [generator.get_state() for generator in _generators(loader)]


def _set_states(loader: DataLoader, states: list[Tensor]) -> None:
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state.cpu())
