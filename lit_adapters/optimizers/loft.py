"""LoFT: AdamW on the full weight, projected on what one factor of B A can express (Tastan et al., arXiv 2505.21289).

B and A take turns, B first; the other one is the partner of that step. With the rank last (see `sides`; X is the factor
with gradient g, Y its partner, y_j row j of Y):

    S = (Y^T Y + damping I)^-1
    h = g S / s                                h Y^T is the full gradient, projected on the columns of Y
    C = Y_before^T Y S                         carries moments over to the present partner
    M = b1 M C + (1 - b1) h                    (n, r)
    Q_i = b2 C^T Q_i C + (1 - b2) h_i^T h_i    (r, r) for each row i of X
    D_ij = (M Y^T)_ij / (1 - b1^t) / (sqrt(y_j Q_i y_j^T / (1 - b2^t)) + eps)      (n, m), not kept
    X = (1 - lr weight_decay) X - lr D Y S / s

The moments of both factors move on in every step, from the same parameters; only the factor in turn is written. Each
step therefore changes W by -lr times AdamW's direction, projected. With s written out this holds for every alpha; with
s = 1 (alpha = r) it is the published rule.

Exact is: with one factor frozen, AdamW on W with projected gradients and updates, at any rank; with square full-rank
factors, AdamW on W itself. Decay leads towards W0, not towards 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapters.optimizers.sides import Batch, ProductOptimizer
from lit_adapters.values import check_number


class LoFT(ProductOptimizer):
    """Full fine-tuning's AdamW within the low-rank pairs, plain AdamW for all else.

    It keeps 2 r (in + out) + r^2 (in + out) numbers for each pair, and forms matrices (out, in) in passing.

    Args:
        params: Groups from `parameter_groups(model, lr, pairs=True)`.
        lr: The learning rate, of the order of full fine-tuning's, as the step is one of W.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment of the pairs.
        clip: The largest norm of all gradients together, those of pairs projected as for the factor in turn; None for
            no clipping. It takes the place of the Trainer's `gradient_clip_val`.
        weight_decay: As AdamW's, on the factor in turn; that of groups wins, and `parameter_groups` gives each one.
        damping: Added to the eigenvalues of Y^T Y, which is 0 for A's first partner.

    Raises:
        AdapterError: A setting is out of range; no group has pairs; the weight of a layer is not a function of B A; or
            a factor is sharded over processes.
    """

    largest_batch = 1 << 24  # 64 MiB for each matrix in float32
    largest_part = 1 << 21  # numbers of a direction D that are formed at a time, in memory that is used again

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        clip: float | None = None,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
    ) -> None:
        check_number("damping", damping, 1e-300)
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "clip": clip, "weight_decay": weight_decay}
        super().__init__(params, settings | {"damping": damping})

    def prepare(self, batch: Batch) -> Tensor:
        """The gradients h, and the inverses S of the partners."""
        gram = batch.y.mT @ batch.y
        values, vectors = torch.linalg.eigh(gram)
        inverse = (vectors / (values.clamp_min(0.0) + batch.group["damping"])[:, None, :]) @ vectors.mT
        h = batch.gradient @ inverse / batch.scale
        batch.work = {"inverse": inverse, "h": h}
        square: Tensor = ((h.mT @ h) * gram).sum()
        return square if _in_turn(batch) else torch.zeros_like(square)

    def apply(self, batch: Batch, shrink: Tensor | None) -> Tensor | None:
        """Move the moments on, and the factor if it is in turn."""
        group, t, y = batch.group, batch.step, batch.y
        beta1, beta2 = group["betas"]
        inverse, h = batch.work["inverse"], batch.work["h"]
        if shrink is not None:
            h = h * shrink
        first = (1 - beta1) * h
        second = _squares((1 - beta2) ** 0.5 * h)  # (k, n, r, r)
        if t > 1:
            carry = self.kept(batch, "partner").mT @ y @ inverse
            first.baddbmm_(self.kept(batch, "first"), carry, alpha=beta1)
            # C^T Q C = (Q C)^T C, as Q is symmetric: two products of all rows of all Q.
            half = (self.kept(batch, "second").flatten(1, 2) @ carry).unflatten(1, (-1, carry.shape[1]))
            second.flatten(1, 2).baddbmm_(half.mT.flatten(1, 2), carry, alpha=beta2)
        self.keep(batch, "partner", y)
        self.keep(batch, "first", first)
        self.keep(batch, "second", second)
        if not _in_turn(batch):
            return None
        projected = self._projected(first / (1 - beta1**t), second / (1 - beta2**t), y, group["eps"])
        rate = group["lr"]
        return (1 - rate * group["weight_decay"]) * batch.x - rate * (projected @ inverse) / batch.scale

    def _projected(self, first: Tensor, second: Tensor, y: Tensor, eps: float) -> Tensor:
        """D Y, (k, n, r), of the corrected moments; the direction D (n, m) is formed in parts."""
        second, squares = second.flatten(2), _squares(y).flatten(2).mT  # y Q y^T is the product of Q and y^T y as rows
        rows = min(first.shape[1], max(1, self.largest_part // y.shape[1]))
        memory = first.new_empty(2, rows, y.shape[1])
        moved = torch.empty_like(first)
        for m, q, y_k, squares_k, out in zip(first, second, y, squares, moved, strict=True):
            for m_part, q_part, out_part in zip(m.split(rows), q.split(rows), out.split(rows), strict=True):
                direction, denominator = memory[:, : len(m_part)]
                torch.mm(q_part, squares_k, out=denominator)
                torch.mm(m_part, y_k.mT, out=direction)
                direction.div_(denominator.clamp_min_(0.0).sqrt_().add_(eps))
                torch.mm(direction, y_k, out=out_part)
        return moved

    def side_shapes(self, n: int, m: int, rank: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Y of the last step, and the moments."""
        return {"partner": (m, rank), "first": (n, rank), "second": (n, rank, rank)}


def _squares(rows: Tensor) -> Tensor:
    """x^T x of each row x, (k, n, r) to (k, n, r, r)."""
    return rows[..., :, None] * rows[..., None, :]


def _in_turn(batch: Batch) -> bool:
    """Whether the factors of a batch are written: B in odd steps of B, A in even ones, and each if it trains alone."""
    side = batch.sides[0]
    return not side.turns or side.is_a == (batch.turn % 2 == 0)
