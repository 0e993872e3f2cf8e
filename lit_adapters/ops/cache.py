"""A value computed from tensors and kept while the tensors stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Value = TypeVar("Value")

_represents_others = True  # whether a tensor may represent another one inside a dispatch mode


class Cache(Generic[Value]):
    """The value that was computed last, with the tensors it depends on. Copies and pickles of a cache are empty."""

    def __init__(self) -> None:
        # One tuple, so that another thread sees all of it or nothing.
        self._last: tuple[Hashable, list[tuple[Tensor, int, int]], Value] | None = None

    @property
    def value(self) -> Value | None:
        """The kept value; None if there is none."""
        return None if self._last is None else self._last[2]

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Value], key: Hashable = None) -> Value:
        """The result of `compute`, taken from an earlier call if `sources` and `key` are the same as then.

        A source has changed if it is another tensor, was written to, for example by an optimiser step, or was given
        other memory (`parameter.data = values`). PyTorch does not count writes through `parameter.data`: call
        `model.eval()` or `model.train()` after them. Nothing is kept where it counts no writes at all (inference
        tensors), or where a tensor may represent another one (inside a dispatch mode).

        Args:
            sources: The tensors that the value depends on.
            compute: Computes the value; called without gradients.
            key: Anything else that the value depends on, such as a dtype.

        Returns:
            The value.
        """
        if may_represent_others() or any(t.is_inference() for t in sources):
            with torch.no_grad():
                return compute()
        versions, last = [(t, t._version, _address(t)) for t in sources], self._last
        if last is not None:
            known_key, known, value = last
            if known_key == key and all(
                t is u and v == w and a == b for (t, v, a), (u, w, b) in zip(known, versions, strict=True)
            ):
                return value
        # A tensor made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        self._last = key, versions, value
        return value

    def clear(self) -> None:
        """Drop the value."""
        self._last = None

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


def may_represent_others() -> bool:
    """Whether a tensor made now may stand for another one, as a fake tensor does, so that it must not be kept."""
    return _represents_others and torch._C._len_torch_dispatch_stack() > 0


@contextmanager
def keeping_in_modes() -> Iterator[None]:
    """Inside the block values are kept in dispatch modes too, for a mode whose tensors represent no others."""
    global _represents_others
    _represents_others = False
    try:
        yield
    finally:
        _represents_others = True


def _address(tensor: Tensor) -> int:
    """Where a plain tensor lies in memory; 0 for tensors of other classes, which may not tell."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _count_writes(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Count the writes of an optimiser: fused ones and those of bitsandbytes do not count their own."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_count_writes)
