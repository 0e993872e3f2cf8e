"""Transforms of torch.func (grad, vmap, jvp ...) and forward-mode derivatives: only plain operations serve them all."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether any is at work, so that a formula must be left to PyTorch; not while a compiler traces, which copes."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
