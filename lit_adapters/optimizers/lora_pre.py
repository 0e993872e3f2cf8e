"""LoRA-Pre: AdamW whose moments of a large matrix are products of rank r (Wang et al., arXiv 2602.24283). Experimental.

For a weight W (p, q) with gradient G, m_B (p, r), m_A (r, q) and likewise v_B, v_A:

    m = b1 m_B m_A + (1 - b1) G                       from the factors of the last step
    v = b2 (v_B v_A)^2 + (1 - b2) G^2                 elementwise: v_B v_A follows |G|
    W = W - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay W)
    m_B = (1 - g1) m_B + g1 G m_A^+                   1 - g1 = sqrt(b1)
    m_A = (1 - g1) m_A + g1 m_B^+ G
    v_B, v_A likewise, with |G| and 1 - g2 = b2^(1/4)

It serves full fine-tuning and the modules of `train`. The factors of LoRA have no side above r, and get plain AdamW.

Experimental, as the authors have not published their code, and as what others wrote down differs in the order of the
updates. Two defaults are ours:

- `order="sequential"`: m_A follows the new m_B. For square matrices with r = p = q the product is then the exact moment
  b1 m + (1 - b1) G. With "simultaneous" both follow the old factors, as published; the product has a term G m^-1 G,
  which has no bound where m is ill-conditioned.
- `second="corrected"`: v_B v_A is a mean of |G|, whose own bias is corrected before it is squared. With "published" the
  steps are up to six times AdamW's after some 80 steps (at b2 = 0.999), so that a warm-up is needed.

The (r, r) matrices are damped before they are inverted, in proportion to their largest eigenvalue, so that the loss may
have any scale.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_adapters.optimizers.base import AdapterOptimizer, working_dtype
from lit_adapters.values import check_choice, check_number, check_whole

_START = 0.02  # standard deviation of m_A and v_A at the start; m_B and v_B are zero


class LoRAPre(AdapterOptimizer):
    """AdamW with 2 r (p + q) numbers of state in place of 2 p q, for matrices with both sides above the rank.

    Matrices (p, q) are formed in passing, so that the peak of memory falls less than the state.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, as for AdamW.
        betas: Decay of the first and of the second moment.
        rank: r. Matrices with a side of r or less, and vectors, get plain AdamW.
        eps: Added to the root of the second moment.
        weight_decay: AdamW's; that of groups wins, and `parameter_groups` gives each group one.
        damping: Added to the eigenvalues of the (r, r) matrices that are inverted, as a share of the largest.
        order: "sequential" or "simultaneous", as published; see the head of this file.
        second: "corrected" or "published"; see the head of this file.

    Raises:
        AdapterError: A setting is out of range, or a parameter is sharded over processes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        rank: int = 8,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        damping: float = 1e-6,
        order: Literal["sequential", "simultaneous"] = "sequential",
        second: Literal["corrected", "published"] = "corrected",
    ) -> None:
        check_whole("rank", rank)
        check_number("eps", eps, 0.0)
        check_number("damping", damping, 0.0, 1.0)
        check_choice("order", order, ("sequential", "simultaneous"))
        check_choice("second", second, ("corrected", "published"))
        settings = {"lr": lr, "betas": tuple(betas), "rank": rank, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"damping": damping, "order": order, "second": second})

    @property
    def needs_whole(self) -> str:
        """As for every optimiser."""
        return "LoRAPre needs whole matrices: use the strategy ddp, or torch.optim.AdamW"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does.

        Raises:
            AdapterError: A parameter is sharded over processes.
        """
        super().add_param_group(param_group)
        self.refuse_shards(self.param_groups[-1]["params"])

    def update(self) -> None:
        """Change large matrices one after the other, then all else."""
        position = 0
        for group in self.param_groups:
            small = []
            for parameter in group["params"]:
                position += 1
                if not _is_large(parameter, group["rank"]):
                    small.append(parameter)
                elif parameter.grad is not None:
                    self._update_matrix(parameter, parameter.grad, group, position)
            self.adamw(small, group, group["lr"], group["eps"])

    def state_shapes(self, group: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
        """As for every optimiser: factors of the moments of large matrices, AdamW's of all else."""
        shapes, rank = super().state_shapes(group), group["rank"]
        for index, parameter in enumerate(group["params"]):
            if _is_large(parameter, rank):
                b, a = (len(parameter), rank), (rank, parameter.shape[1])
                shapes[index] = {"step": (), "first_b": b, "first_a": a, "second_b": b, "second_a": a}
        return shapes

    def _update_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], position: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_start(parameter, group["rank"], position))
        gradient = gradient.to(working_dtype(parameter))
        size = gradient.abs()
        t = int(state["step"]) + 1
        beta1, beta2 = group["betas"]
        first = beta1 * (state["first_b"] @ state["first_a"]) + (1 - beta1) * gradient
        second = beta2 * (state["second_b"] @ state["second_a"]).square()
        if group["second"] == "corrected" and t > 1:
            second *= (1 - beta2 ** (t - 1)) / (1 - beta2 ** ((t - 1) / 2)) ** 2
        second += (1 - beta2) * gradient.square()
        direction = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_((group["lr"] * direction).to(parameter.dtype))
        for name, value, keep in (("first", gradient, beta1**0.5), ("second", size, beta2**0.25)):
            old = state[f"{name}_b"], state[f"{name}_a"]
            new = next_factors(*old, value, keep, group["order"], group["damping"])
            for tensor, moved in zip(old, new, strict=True):
                tensor.copy_(moved)
        state["step"] += 1


def _is_large(parameter: Tensor, rank: int) -> bool:
    return parameter.dim() == 2 and min(parameter.shape) > rank


def next_factors(b: Tensor, a: Tensor, value: Tensor, keep: float, order: str, damping: float) -> tuple[Tensor, Tensor]:
    """Move the factors of a running mean towards a new value.

    Args:
        b: (p, r).
        a: (r, q).
        value: The new value (p, q).
        keep: The share of the old factors; the product keeps its square.
        order: "sequential", where the second factor follows the new first one, or "simultaneous".
        damping: Added to the eigenvalues of the (r, r) matrices that are inverted, as a share of the largest.

    Returns:
        The new b and a.
    """
    new_b = keep * b + (1 - keep) * (value @ a.mT) @ _inverse(a @ a.mT, damping)
    leader = new_b if order == "sequential" else b
    new_a = keep * a + (1 - keep) * _inverse(leader.mT @ leader, damping) @ (leader.mT @ value)
    return new_b, new_a


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """The damped inverse of a matrix (r, r) without negative eigenvalues; finite for a matrix of zeros."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0) + damping * values[-1].clamp_min(0.0)
    return (vectors / values.clamp_min(torch.finfo(gram.dtype).tiny)) @ vectors.mT


def _start(parameter: Tensor, rank: int, position: int) -> dict[str, Tensor]:
    """The state before the first step; random values follow from the position of the parameter alone."""
    p, q = parameter.shape
    draw = torch.Generator().manual_seed(position)
    dtype, device = working_dtype(parameter), parameter.device
    state = {"step": torch.zeros(())}
    for name in ("first", "second"):
        state[f"{name}_b"] = torch.zeros(p, rank, dtype=dtype, device=device)
        state[f"{name}_a"] = (_START * torch.randn(rank, q, generator=draw, dtype=dtype)).to(device)
    return state
