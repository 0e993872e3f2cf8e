"""How well a draft follows its target: the distillation loss, and what to expect of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Draft and target at n tokens; each float32 (n,).

    Attributes:
        kl: KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats; the only one with a gradient, in q.
        greedy: 1 where the likeliest tokens of both are the same, else 0.
        acceptance: The probability that a token drawn from q is accepted, sum_v min(p(v), q(v)).
    """

    kl: Tensor
    greedy: Tensor
    acceptance: Tensor


def agreement(target: Tensor, draft: Tensor) -> Agreement:
    """Compare next-token distributions, p of the target and q of the draft, at temperature 1.

    A token drawn from q is accepted with probability min(1, p / q), so with sum_v min(p(v), q(v)) on average
    (Leviathan et al., arXiv 2211.17192, section 3.1 and theorem 3.5); without temperature, if it is p's likeliest.

    Args:
        target: Logits (n, V); no gradient goes there.
        draft: Logits (n, V). If one has more columns than the other, as its embeddings are padded for speed, these are
            left out: no token has them.
    """
    common = min(target.shape[-1], draft.shape[-1])
    target, draft = target[..., :common], draft[..., :common]
    log_p, log_q = F.log_softmax(target.detach(), dim=-1), F.log_softmax(draft, dim=-1)
    p = log_p.exp()
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    with torch.no_grad():
        greedy = (target.argmax(-1) == draft.argmax(-1)).to(kl.dtype)
        return Agreement(kl, greedy, torch.minimum(p, log_q.exp()).sum(-1))
