"""The low-rank pairs of a model: which two parameters are the A and B of one product, and the factor on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.model.record import adapters


@dataclass
class LowRankPair:
    """The two factors of one adapted layer.

    Attributes:
        name: The qualified name of the layer.
        a: A, (r, in).
        b: B, (out, r).
        scale: s, the factor on B A.
        obstacle: Why the layer's weight is not a function of B A alone; empty if it is one.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    obstacle: str = ""


def low_rank_pairs(model: nn.Module) -> list[LowRankPair]:
    """The pairs of a model in which at least one factor trains.

    They are found by the adapter that holds them, not by the order of parameters: other parameters (magnitudes of DoRA,
    coefficients of functions, a head) may stand anywhere between them.

    Args:
        model: A module whose tree may hold adapters.
    """
    return [
        LowRankPair(name, adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.product_obstacle())
        for name, adapter in adapters(model)
        if isinstance(adapter, LowRankAdapter) and (adapter.lora_A.requires_grad or adapter.lora_B.requires_grad)
    ]
