"""Random numbers that go on as if nothing had been drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import Generator


@contextmanager
def same_random_numbers(generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Inside the block, random numbers may be drawn; after it they go on as before.

    Args:
        generators: Further ones that do, beside those of Python, numpy and torch.
    """
    states = random.getstate(), numpy.random.get_state()
    own = [generator.get_state() for generator in generators]
    try:
        # Of all devices by default, with a warning about their number.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
