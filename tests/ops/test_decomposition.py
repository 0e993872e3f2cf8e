"""Singular vectors with fixed signs, and principal directions of rows that come in batches."""

import pytest
import torch

from lit_adapters.ops.decomposition import PrincipalDirections, leading_svd


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_leading_svd_is_the_best_approximation_with_fixed_signs(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, vh = leading_svd(matrix, 3)
    error = torch.linalg.matrix_norm(matrix - u * values @ vh, 2)
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[3])
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    other, _, _ = leading_svd(-matrix, 3)
    torch.testing.assert_close(other, u)


def rows(number: int, width: int = 10) -> torch.Tensor:
    """Rows whose mean and spread differ between columns, float64."""
    x = torch.randn(number, width, dtype=torch.float64)
    return 3 + x * torch.logspace(0, -1, width, dtype=torch.float64)


@pytest.mark.parametrize("count", [3, 2])  # 4 * 3 directions are all there are; 4 * 2 are not
def test_directions_of_batches_are_those_of_all_rows_together(count):
    batches = [rows(n) for n in (40, 7, 1, 60)]
    found = PrincipalDirections(count)
    for batch in batches:
        found.add(batch)
    together = torch.cat(batches)
    exact = torch.linalg.svd(together - together.mean(0))[2][:count]
    cosines = (found.directions() * exact).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-12 if count == 3 else 1e-3)
    assert found.rows == 108


def test_directions_are_those_of_pefts_incremental_pca():
    pca = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA(n_components=3)
    found, batches = PrincipalDirections(3), [rows(50), rows(50)]
    for batch in batches:
        found.add(batch)
        pca.partial_fit(batch)
    cosines = (found.directions() * pca.components_).sum(1).abs()
    assert (cosines > 0.99).all()  # peft keeps three directions between batches, here all are kept


def test_too_few_directions():
    found = PrincipalDirections(3)
    assert found.directions() is None
    found.add(rows(1))
    assert found.directions() is None
    found.add(rows(2))  # three rows differ from their mean in two directions
    assert found.directions() is None
    found.add(rows(2))
    directions = found.directions()
    torch.testing.assert_close(directions @ directions.T, torch.eye(3, dtype=torch.float64))
