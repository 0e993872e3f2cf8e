"""The low-rank pairs of a model: which two parameters are the A and B of one product, and the factor on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.model.record import adapters


@dataclass
class LowRankPair:
    """The two factors of one adapted layer.

    Attributes:
        name: The qualified name of the layer.
        a: A, (r, in); (E, r, in) for E experts.
        b: B, (out, r); (E, out, r) for E experts.
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
    found = []
    for name, adapter in adapters(model):
        if isinstance(adapter, LowRankAdapter):
            obstacle = adapter.product_obstacle()
            found.append(LowRankPair(name, adapter.lora_A, adapter.lora_B, adapter.scaling, obstacle))
        elif isinstance(adapter, ExpertsAdapter):
            obstacle = f"{name!r} holds the pairs of several experts in one parameter"
            pairs = {stack: adapter.pair(stack) for stack in adapter.merges_into}
            found += [LowRankPair(f"{name}.{s}", *pair, adapter.scaling[s], obstacle) for s, pair in pairs.items()]
    return [pair for pair in found if pair.a.requires_grad or pair.b.requires_grad]
