"""What is formed from tensors is kept between calls, for as long as the tensors stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Formed = TypeVar("Formed")


class Kept(Generic[Formed]):
    """What was formed last. Copies and pickles begin empty: it can be formed again."""

    def __init__(self) -> None:
        # One object, so that another thread sees all of it or nothing.
        self._last: tuple[torch.dtype, list[tuple[Tensor, int]], Formed] | None = None

    @property
    def value(self) -> Formed | None:
        """What is kept; None if nothing is."""
        return None if self._last is None else self._last[2]

    def get(self, dtype: torch.dtype, made_from: Sequence[Any], form: Callable[[], Formed]) -> Formed:
        """What `form` gives, for `dtype`; from an earlier call if all tensors `made_from` are as they were then.

        Another tensor or a writing, such as an optimiser step, makes a difference. Nothing is kept where writings are
        not counted (inference tensors) or tensors may be stand-ins (in a dispatch mode).
        """
        if torch._C._len_torch_dispatch_stack() or any(t.is_inference() for t in made_from):
            with torch.no_grad():
                return form()
        versions, last = [(t, t._version) for t in made_from], self._last
        if last is not None:
            known_dtype, known, formed = last
            if known_dtype == dtype and all(t is u and v == w for (t, v), (u, w) in zip(known, versions, strict=True)):
                return formed
        # A tensor made in inference mode could never take part in training.
        with torch.inference_mode(False), torch.no_grad():
            formed = form()
        self._last = dtype, versions, formed
        return formed

    def clear(self) -> None:
        """Forget it."""
        self._last = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _count_fused(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimisers write to parameters without counting it as a writing, unlike all others."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused)
