"""Singular vectors of a matrix, and principal directions of rows that come in batches.

Signs are fixed, so that every machine and every library of linear algebra gives the same vectors up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 4  # directions kept between batches, as a multiple of those that are asked for


@torch.no_grad()
def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors, from the whole decomposition.

    Args:
        matrix: (out, in), float32 or float64.
        rank: How many, at most min(out, in).

    Returns:
        U (out, rank), the singular values (rank,) in descending order, and V^T (rank, in). In every column of U the
        entry of largest size is positive.
    """
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, values, vh = u[:, :rank], values[:rank], vh[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, values, vh * signs.T


class PrincipalDirections:
    """The principal directions of rows (N, in) that are given in batches: incremental PCA (Ross et al., 2008).

    Between batches it keeps the mean, and four times as many directions as are asked for. scikit-learn and peft have
    the same in larger form: the library needs neither of them otherwise.

    Args:
        count: How many directions are asked for, at most the number of columns.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = 0  # N so far
        self._mean: Tensor | None = None  # (in,)
        self._scaled: Tensor | None = None  # the kept directions times their singular values (k, in)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take up further rows (n, in), float32 or float64."""
        before, number = self.rows, len(rows)
        if not number:
            return
        mean = rows.mean(0)
        parts = [rows - mean]
        if self._scaled is not None and self._mean is not None:
            shift = (before * number / (before + number)) ** 0.5 * (self._mean - mean)
            parts += [self._scaled, shift[None]]
            mean = (before * self._mean + number * mean) / (before + number)
        together = torch.cat(parts)
        _, values, vh = leading_svd(together, min(_KEPT * self.count, *together.shape))
        self.rows, self._mean, self._scaled = before + number, mean, values[:, None] * vh

    def directions(self) -> Tensor | None:
        """The directions of largest variance, orthonormal rows (count, in); None if the rows vary in fewer."""
        if self._scaled is None or len(self._scaled) < self.count:
            return None
        sizes = torch.linalg.vector_norm(self._scaled[: self.count], dim=1, keepdim=True)
        least = torch.finfo(sizes.dtype).eps * self._scaled.shape[1] * sizes.max()
        return None if bool((sizes <= least).any()) else self._scaled[: self.count] / sizes
