"""Token selection of PointLoRA (arXiv 2504.16023): scores of tokens at several scales, and the best of each.

    p = sigmoid(W2 relu(W1 token))                       W1 (D/2, D), W2 (1, D/2)
    loss = sum over scales of w mean(p log p + (1 - p) log(1 - p))

Two facts of the published method, which this file keeps. Taking the best tokens passes no gradient, and the tokens are
not weighted by their scores, so the scores learn from `loss` alone. And `loss` is minus an entropy: minimising it moves
every score towards 1/2, so that which tokens are the best is close to arbitrary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.values import check_whole


class TokenSelector(nn.Module):
    """Scores the tokens of each scale with one network, and takes the best.

    A model calls it and appends the tokens to its sequence, with their position codes.

    Args:
        width: D, the number of channels of a token.
        keep: How many tokens to take, for each scale.
        weights: The weight of each scale in the loss.

    Raises:
        AdapterError: A number is not a positive whole number, or `keep` and `weights` are not equally long.
    """

    def __init__(self, width: int, keep: Sequence[int] = (32, 8), weights: Sequence[float] = (1.0, 0.25)) -> None:
        super().__init__()
        check_whole("width", width, low=2)
        for number in keep:
            check_whole("keep", number)
        if len(keep) != len(weights):
            raise AdapterError(f"keep {list(keep)} and weights {list(weights)} must have one number for each scale")
        self.keep, self.weights = list(keep), list(weights)
        self.score = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))

    def forward(self, scales: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Select tokens.

        Args:
            scales: The tokens of each scale, (batch, tokens, D).

        Returns:
            The indices of the best tokens of each scale, (batch, keep), the best first; and the loss, one number.

        Raises:
            AdapterError: The number of scales is not that of `keep`, or a scale has fewer tokens than `keep`.
        """
        sizes = [tokens.shape[1] for tokens in scales]
        if len(sizes) != len(self.keep) or any(size < k for size, k in zip(sizes, self.keep, strict=True)):
            raise AdapterError(f"keep {self.keep} cannot be taken from scales of {sizes} tokens; lower `keep`")
        logits = [self.score(tokens).squeeze(-1) for tokens in scales]
        indices = [z.topk(k, dim=1).indices for z, k in zip(logits, self.keep, strict=True)]
        losses = [w * _negative_entropy(z) for z, w in zip(logits, self.weights, strict=True)]
        return indices, torch.stack(losses).sum()


def _negative_entropy(logits: Tensor) -> Tensor:
    """mean(p log p + (1 - p) log(1 - p)) for p = sigmoid(logits); finite for any logits."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    p = logits.sigmoid()
    return (p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).mean()


def take(values: Tensor, indices: Tensor) -> Tensor:
    """The rows of each item that `indices` names: (batch, N, D) and (batch, K) give (batch, K, D)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))
