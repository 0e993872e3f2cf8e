"""A small transformer of point clouds, built like that of Point-MAE (arXiv 2203.06604)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from examples.point_clouds.geometry import group
from lit_adapters.methods.token_selection import TokenSelector, take


class PatchEncoder(nn.Module):
    """A small PointNet: the points of a patch to one token; the order of the points does not matter.

    Args:
        width: D, the number of channels of a token.
        hidden: The number of channels of the first convolution; those after it have more.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(3, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, 2 * hidden, 1)
        )
        self.second = nn.Sequential(
            nn.Conv1d(4 * hidden, 4 * hidden, 1), nn.BatchNorm1d(4 * hidden), nn.ReLU(), nn.Conv1d(4 * hidden, width, 1)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(batch, groups, size, 3) -> (batch, groups, D)."""
        features = self.first(patches.flatten(0, 1).transpose(1, 2))
        whole = features.amax(dim=2, keepdim=True).expand_as(features)
        tokens = self.second(torch.cat([whole, features], dim=1)).amax(dim=2)
        return tokens.unflatten(0, patches.shape[:2])


class PointTransformer(nn.Module):
    """Patches of a cloud as tokens, a transformer, and a classifier.

    Args:
        classes: The number of classes.
        width: D, the number of channels of a token.
        depth: The number of blocks.
        heads: The number of heads of attention.
        scales: The number of patches and the points of each: first those that make the sequence, which are also the
            first scale of the token selection, then its further scales.
        keep: The number of selected tokens, for each scale.
        hidden: As for `PatchEncoder`.
        head_hidden: The width of the classifier.

    Attributes:
        selector: The token selection; None leaves it out.
    """

    def __init__(
        self,
        classes: int,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        scales: Sequence[tuple[int, int]] = ((32, 16), (16, 32)),
        keep: Sequence[int] = (8, 2),
        hidden: int = 16,
        head_hidden: int = 64,
    ) -> None:
        super().__init__()
        self.width, self.head_hidden = width, head_hidden
        self.scales, self.keep = tuple(scales), tuple(keep)
        self.encoder = PatchEncoder(width, hidden)
        self.position = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cls_position = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.selector: TokenSelector | None = None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = self._new_head(classes)

    def _new_head(self, classes: int) -> nn.Sequential:
        hidden = self.head_hidden
        layers: list[nn.Module] = []
        for inputs in (2 * self.width, hidden):
            layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Linear(hidden, classes))

    def get_classifier(self) -> nn.Module:
        """The head, as timm names it; `attach` leaves it alone and counts it apart."""
        return self.head

    def reset_classifier(self, classes: int) -> None:
        """A new head, for other classes."""
        self.head = self._new_head(classes)

    def select_tokens(self) -> int:
        """Add a token selection, untrained.

        Returns:
            The number of tokens that it appends to the sequence.
        """
        self.selector = TokenSelector(self.width, self.keep)
        return sum(self.keep)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Classify clouds.

        Args:
            points: Positions (batch, N, 3).

        Returns:
            The logits (batch, classes); and the loss of the token selection, one number, 0 if there is none.
        """
        tokens, positions, selection = self.embed(points)
        for block in self.blocks:
            tokens = block(tokens + positions)
        tokens = self.norm(tokens)
        return self.head(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)), selection

    def embed(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence [class token, patches, selected tokens], its position codes, and the loss of the selection."""
        scales = self.scales if self.selector else self.scales[:1]
        grouped = [group(points, *scale) for scale in scales]
        tokens = [self.encoder(patches) for _, patches in grouped]
        positions = [self.position(centres) for centres, _ in grouped]
        sequence = [self.cls_token.expand(len(points), -1, -1), tokens[0]]
        codes = [self.cls_position.expand(len(points), -1, -1), positions[0]]
        loss = points.new_zeros(())
        if self.selector is not None:
            chosen, loss = self.selector(tokens)
            sequence += [take(t, indices) for t, indices in zip(tokens, chosen, strict=True)]
            codes += [take(p, indices) for p, indices in zip(positions, chosen, strict=True)]
        return torch.cat(sequence, dim=1), torch.cat(codes, dim=1), loss
