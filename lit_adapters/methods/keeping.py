"""Adapters that keep a tensor between calls, for as long as what it was formed from stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_adapters.methods.low_rank import LowRankAdapter


class KeepingAdapter(LowRankAdapter):
    """A low-rank adapter that in eval mode, without gradients, need not form the same tensor for every call."""

    cache_weight = False  # whether it is kept while training too
    _cache: tuple[list[tuple[Tensor, int]], Tensor] | None = None

    def may_keep(self) -> bool:
        """Whether a tensor may be kept now: in eval mode when no gradient is wanted, and while training on request."""
        if torch.compiler.is_compiling():
            return False
        return self.cache_weight if self.training else not (torch.is_grad_enabled() or self.sharded)

    def kept(self, dtype: torch.dtype, made_from: Sequence[Tensor | None], form: Callable[[], Tensor]) -> Tensor:
        """What `form` gives, in `dtype`; from an earlier call if all of `made_from` are the same and unwritten since.

        An optimiser step is such a writing.
        """
        versions = [(t, 0 if t.is_inference() else t._version) for t in made_from if t is not None]
        if self._cache is not None:
            known, tensor = self._cache
            if tensor.dtype == dtype and all(t is u and v == w for (t, v), (u, w) in zip(known, versions, strict=True)):
                return tensor
        # A tensor made in inference mode could never take part in training.
        with torch.inference_mode(False), torch.no_grad():
            tensor = form()
        self._cache = (versions, tensor)
        return tensor

    def clear_cache(self) -> None:
        """Forget the kept tensor."""
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}
