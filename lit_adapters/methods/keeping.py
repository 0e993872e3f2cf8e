"""Adapters that keep what they form between calls, for as long as what it was formed from stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_adapters.methods.base import AdapterModule

Formed = TypeVar("Formed")


class KeepingAdapter(AdapterModule):
    """An adapter that in eval mode, without gradients, need not form the same tensors for every call."""

    cache_weight = False  # whether they are kept while training too
    _cache: tuple[tuple[torch.dtype, list[tuple[Tensor, int]]], Any] | None = None

    def may_keep(self) -> bool:
        """Whether anything may be kept now: in eval mode when no gradient is wanted, and while training on request."""
        if torch.compiler.is_compiling():
            return False
        return self.cache_weight if self.training else not (torch.is_grad_enabled() or self.sharded)

    def kept(self, dtype: torch.dtype, made_from: Sequence[Tensor | None], form: Callable[[], Formed]) -> Formed:
        """What `form` gives, for `dtype`; from an earlier call if all of `made_from` are the same and unwritten since.

        An optimiser step is such a writing.
        """
        versions = [(t, 0 if t.is_inference() else t._version) for t in made_from if t is not None]
        if self._cache is not None:
            (known_dtype, known), formed = self._cache
            if known_dtype == dtype and all(t is u and v == w for (t, v), (u, w) in zip(known, versions, strict=True)):
                return formed  # type: ignore[no-any-return]
        # A tensor made in inference mode could never take part in training.
        with torch.inference_mode(False), torch.no_grad():
            formed = form()
        self._cache = (dtype, versions), formed
        return formed

    def clear_cache(self) -> None:
        """Forget what is kept."""
        self._cache = None

    def train(self, mode: bool = True) -> KeepingAdapter:
        self.clear_cache()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:  # type: ignore[override]
        self.clear_cache()
        super()._load_from_state_dict(*args)
