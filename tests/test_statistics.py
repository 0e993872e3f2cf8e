"""Statistics of functions against closed forms."""

import pytest
import torch

from lit_adapters.statistics import drift, slope_bound

GRID = torch.linspace(-1, 1, 2001, dtype=torch.float64)


def test_drift_of_a_shifted_line_under_a_uniform_density():
    moved = drift(torch.stack([GRID + 0.5, 2 * GRID]), GRID, torch.ones_like(GRID))
    # a constant shift of 0.5; doubling adds x itself, whose mean square over [-1, 1] is 1/3
    assert moved.l2.tolist() == pytest.approx([0.5, (1 / 3) ** 0.5], rel=1e-3)
    assert moved.relative.tolist() == pytest.approx([0.5 * 3**0.5, 1.0], rel=1e-3)
    assert moved.sup.tolist() == pytest.approx([0.5, 1.0])
    assert moved.relative_sup.tolist() == pytest.approx([0.5, 1.0])


def test_drift_counts_only_where_inputs_are():
    density = (GRID > 0).double()
    moved = drift(torch.where(GRID > 0, GRID, GRID + 7), GRID, density)
    assert moved.l2.item() == 0.0
    assert moved.sup.item() == pytest.approx(7.0)


def test_drift_from_the_zero_function_is_finite():
    moved = drift(torch.zeros_like(GRID), torch.zeros_like(GRID), torch.ones_like(GRID))
    assert moved.relative.item() == 0.0


def test_slope_bound_of_a_parabola():
    assert slope_bound(GRID**2, GRID).item() == pytest.approx(2.0, rel=1e-3)
