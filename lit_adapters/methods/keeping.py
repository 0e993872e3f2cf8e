"""Adapters that keep what they form from their tensors."""

from __future__ import annotations

from typing import Any

import torch

from lit_adapters.methods.base import AdapterModule
from lit_adapters.ops._transforms import transformed
from lit_adapters.ops.kept import Kept


class KeepingAdapter(AdapterModule):
    """An adapter that in eval mode, without gradients, need not form the same tensors for every call."""

    cache_weight = False  # whether they are kept while training too

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: Kept[Any] = Kept()

    def may_keep(self) -> bool:
        """Whether anything may be kept now: in eval mode when no gradient is wanted, and while training on request."""
        if torch.compiler.is_compiling() or transformed():
            return False
        return self.cache_weight if self.training else not (torch.is_grad_enabled() or self.sharded)

    def train(self, mode: bool = True) -> KeepingAdapter:
        self.kept.clear()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:  # type: ignore[override]
        self.kept.clear()
        super()._load_from_state_dict(*args)
