"""Activations that are annealed to the identity: phi_beta(z) = beta sigma(z) + (1 - beta) z (arXiv 2512.22455)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "centered_sigmoid": lambda z: torch.sigmoid(z) - 0.5,  # without sigma(0)
}


def annealed(z: Tensor, activation: Callable[[Tensor], Tensor], beta: Tensor) -> Tensor:
    """beta sigma(z) + (1 - beta) z, any shape; exactly z at beta = 0 and exactly sigma(z) at beta = 1.

    beta is a tensor of no dimension, so that moving it changes neither dtype nor graph.
    """
    return beta * activation(z) + (1 - beta) * z
