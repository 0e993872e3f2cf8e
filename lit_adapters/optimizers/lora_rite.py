"""LoRA-RITE: an optimiser whose step does not depend on how the product B A is factored (Yen et al., arXiv 2410.20625).

Each factor X with gradient g is preconditioned in an orthonormal basis of its partner Y (see `sides`; n rows in X):

    Y = U R                                    QR: U orthonormal, R (r, r)
    h = g R^+                                  the gradient without the partner's size; 0 while the partner is 0
    P = U^T U_before                           the change of the basis since the last step
    V = d2 P V P^T + (1 - d2) h^T h / n        (r, r)
    u = h ((V + rho I + eps^2 I)^(1/2) + eps I)^-1
    M = d1 M P^T + (1 - d1) u                  the first moment, of u
    X = X - lr (M R^+T + weight_decay X)

d_k = b_k (1 - b_k^(t-1)) / (1 - b_k^t) is the decay of a mean without bias. rho is what V has lost by changes of the
basis, if `escape` is on, and 0 otherwise. Both factors move at once. The factor s on B A only rescales the rate.

Where a gradient has a lower rank than r, the other directions of V are rounding. They would be scaled up to the size of
true ones, and A and B with them. So eigenvalues of V are raised to `_FLOOR` of the largest, which in float32 damps
directions of h below 1e-3 of the largest. Directions of Y below `_CUTOFF` of the largest (1e-4) are left out of R^+.

Replacing A by T^-1 A and B by B T, for any invertible T, leaves every later product B A unchanged.

`pytorch_optimizer` has this method too. Ours finds pairs by their adapter, gives other parameters to AdamW in the same
optimiser, keeps its state as tensors, stacks layers, and never skips a large gradient silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_adapters.optimizers.sides import Batch, ProductOptimizer
from lit_adapters.values import check_flag

# In units of the dtype's rounding: about the error of eigenvalues, and what R keeps of them after a step.
_FLOOR, _CUTOFF = 8.0, 1e3


class LoRARITE(ProductOptimizer):
    """Invariant transformation equilibration for the pairs, AdamW for all else.

    It keeps r (in + out) moments, r (in + out) numbers of the bases and 2 r^2 more for each pair.

    Args:
        params: Groups from `parameter_groups(model, lr, pairs=True)`.
        lr: The learning rate, of AdamW's order.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment of the pairs.
        clip: The largest norm of all gradients together, those of pairs in the bases of their partners; None for no
            clipping. It takes the place of the Trainer's `gradient_clip_val`.
        weight_decay: As AdamW's; that of groups wins, and `parameter_groups` gives each group one.
        escape: Add to the second moment what changes of the basis took from it, as the paper has it; the authors' code
            leaves this off.

    Raises:
        AdapterError: A setting is out of range; no group has pairs; the weight of a layer is not a function of B A; or
            a factor is sharded over processes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        clip: float | None = 1.0,
        weight_decay: float = 0.0,
        escape: bool = False,
    ) -> None:
        check_flag("escape", escape)
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "clip": clip, "weight_decay": weight_decay}
        super().__init__(params, settings | {"escape": escape})

    def prepare(self, batch: Batch) -> Tensor:
        """The gradients h in the bases of the partners."""
        basis, triangle = torch.linalg.qr(batch.y)
        inverse = torch.linalg.pinv(triangle, rtol=_CUTOFF * torch.finfo(triangle.dtype).eps)
        h = batch.gradient @ inverse
        batch.work = {"basis": basis, "inverse": inverse, "h": h}
        return h.square().sum()

    def apply(self, batch: Batch, shrink: Tensor | None) -> Tensor:
        """One step of all sides of a batch."""
        group, t = batch.group, batch.step
        basis, inverse, h = batch.work["basis"], batch.work["inverse"], batch.work["h"]
        if shrink is not None:
            h = h * shrink
        decay1, decay2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"])
        second = _symmetric(h.mT @ h) / h.shape[1]
        lost: Tensor | float = 0.0
        if t > 1:
            change = basis.mT @ self.kept(batch, "basis")
            before = self.kept(batch, "second")
            moved = _symmetric(change @ before @ change.mT)
            if group["escape"]:
                lost = decay2 * (self.kept(batch, "escaped") + _loss(before, moved))
            second = decay2 * moved + (1 - decay2) * second
        values, vectors = torch.linalg.eigh(second)
        floor = _FLOOR * torch.finfo(values.dtype).eps * values[:, -1:].clamp_min(0.0)
        root = (values.maximum(floor) + lost + group["eps"] ** 2).sqrt() + group["eps"]
        first = h @ (vectors / root[:, None, :]) @ vectors.mT
        if t > 1:
            first = decay1 * self.kept(batch, "first") @ change.mT + (1 - decay1) * first
        self.keep(batch, "basis", basis)
        self.keep(batch, "second", second)
        self.keep(batch, "first", first)
        if group["escape"]:
            self.keep(batch, "escaped", lost if isinstance(lost, Tensor) else second.new_zeros(len(second), 1))
        return batch.x - group["lr"] * (first @ inverse.mT + group["weight_decay"] * batch.x)

    def side_shapes(self, n: int, m: int, rank: int, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The basis of Y, and the moments in it."""
        shapes: dict[str, tuple[int, ...]] = {"basis": (m, rank), "second": (rank, rank), "first": (n, rank)}
        return shapes | {"escaped": (1,)} if group["escape"] else shapes


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _loss(before: Tensor, after: Tensor) -> Tensor:
    """How much second moment a change of the basis has taken away: (k, r, r) and (k, r, r) to (k, 1).

    The largest loss of an eigenvalue, or that of the trace if it is smaller.
    """
    eigenvalue = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax(-1)
    trace = (before - after).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(eigenvalue, trace).clamp_min(0.0)[:, None]
