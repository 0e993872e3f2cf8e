"""Detects transforms of torch.func (grad, vmap, jvp ...) and forward-mode derivatives, which need plain operations."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform is active, so that PyTorch must differentiate the plain formula.

    False under torch.compile, which traces the custom operators itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
