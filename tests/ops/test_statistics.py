"""Statistics of functions and of low-rank updates against closed forms and brute force."""

import pytest
import torch

from lit_adapters.ops.statistics import (
    components,
    cosine,
    drift,
    effective_rank,
    functional_subspace,
    histogram,
    leading_subspace,
    overlap,
    principal_angles,
    product_spectrum,
    regular_sample,
    slope_bound,
    stable_rank,
)

GRID = torch.linspace(-1, 1, 2001, dtype=torch.float64)


def test_drift_of_a_shifted_line_under_a_uniform_density():
    moved = drift(torch.stack([GRID + 0.5, 2 * GRID]), GRID, torch.ones_like(GRID))
    # a constant shift of 0.5; doubling adds x itself, whose mean square over [-1, 1] is 1/3
    assert moved.l2.tolist() == pytest.approx([0.5, (1 / 3) ** 0.5], rel=1e-3)
    assert moved.relative.tolist() == pytest.approx([0.5 * 3**0.5, 1.0], rel=1e-3)
    assert moved.sup.tolist() == pytest.approx([0.5, 1.0])


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


def low_rank(out=30, inner=5, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    a = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    return b, a


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()).Q


def test_ranks_of_spectra_known_in_closed_form():
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.tensor([3.0, 0.0])) == effective_rank(torch.tensor([3.0, 0.0])) == 1.0
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)
    # energies 4/5 and 1/5
    assert effective_rank(torch.tensor([1.0, 2.0])) == pytest.approx((5 / 4) ** 0.8 * 5**0.2)
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0.0


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.99, 3), (1.0, 3)])
def test_components(share, expected):
    assert components(torch.tensor([3.0, 1.0, 16.0]).sqrt(), share) == expected


def test_components_of_nothing():
    assert components(torch.zeros(4), 0.9) == 0


def test_the_spectrum_of_a_product_is_that_of_the_formed_matrix():
    b, a = low_rank()
    u, values = product_spectrum(b, a)
    full_u, full_values, _ = torch.linalg.svd(b @ a)
    torch.testing.assert_close(values, full_values[:5])
    assert full_values[5:].max() < 1e-12
    torch.testing.assert_close(u @ u.T, full_u[:, :5] @ full_u[:, :5].T)


def test_the_spectrum_of_a_fresh_pair_is_zero():
    b, a = low_rank()
    assert not product_spectrum(torch.zeros_like(b), a)[1].any()


def test_the_leading_subspace_is_that_of_the_svd_and_draws_nothing():
    values = torch.tensor([9.0, 7.0, 5.0, *torch.linspace(1, 0.1, 17).tolist()]).double()
    u, v = orthonormal(40, 20), orthonormal(25, 20, seed=1)
    matrix = (u * values) @ v.T
    state = torch.get_rng_state()
    basis = leading_subspace(matrix, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert overlap(basis, u[:, :3]) == pytest.approx(1.0, abs=1e-6)
    assert overlap(basis, u[:, 3:]) == pytest.approx(0.0, abs=1e-6)


def test_angles_and_overlap_of_planes_turned_by_known_angles():
    first = torch.eye(4, dtype=torch.float64)[:, :2]
    turned = first.clone()
    turned[0, 0], turned[2, 0] = torch.cos(torch.tensor(0.3)), torch.sin(torch.tensor(0.3))
    assert principal_angles(first, turned).tolist() == pytest.approx([0.0, 0.3], abs=1e-6)
    assert overlap(first, turned) == pytest.approx((1 + torch.cos(torch.tensor(0.3)).item() ** 2) / 2)
    assert overlap(first, first[:, :1]) == pytest.approx(1.0)


def test_overlap_by_chance():
    """Of random k- and l-dimensional spaces in n dimensions l / n on average."""
    found = [overlap(orthonormal(50, 3, seed=s), orthonormal(50, 10, seed=100 + s)) for s in range(40)]
    assert sum(found) / 40 == pytest.approx(0.2, abs=0.03)


def test_cosine():
    assert cosine(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])) == pytest.approx(0.5**0.5)
    assert cosine(torch.zeros(2), torch.ones(2)) == 0.0


def test_functions_from_a_plane_span_a_plane():
    """Changes are mixtures of x and x^3: two directions, and the energies are those of the drifts."""
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    changes = mixture @ torch.stack([GRID, GRID**3])
    uniform = torch.ones(12, len(GRID))
    space = functional_subspace(changes, uniform, GRID)
    assert components(space.singular_values, 1 - 1e-12) == 2
    drifts = drift(changes, torch.zeros_like(GRID), uniform[0].double()).l2
    assert space.singular_values.square().sum().item() == pytest.approx(drifts.square().sum().item())
    weighted = torch.stack([GRID, GRID**3]) / len(GRID) ** 0.5
    assert overlap(space.directions[:2].T, torch.linalg.qr(weighted.T).Q) == pytest.approx(1.0)


def test_functions_count_where_their_own_inputs_are():
    """The second function differs where it has no inputs, and so adds no direction."""
    changes = torch.stack([GRID, torch.where(GRID > 0, GRID, 100.0)])
    densities = torch.stack([torch.ones_like(GRID), (GRID > 0).double()])
    values = functional_subspace(changes, densities, GRID).singular_values
    assert values.square().sum().item() == pytest.approx(1 / 3 + 1 / 3, rel=1e-2)


def test_nan_is_counted_nowhere():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5])
    assert histogram(values, 0.0, 1.0, 2).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("shape", [(32, 128, 96), (256, 197, 8), (7,), (0,)])
def test_a_regular_sample_visits_all_channels_alike(shape):
    channels = torch.arange(shape[-1]).expand(shape)
    sample = regular_sample(channels, 4096)
    assert len(sample) <= max(channels.numel(), 1)
    if channels.numel() > 10_000:
        counts = torch.bincount(sample, minlength=shape[-1])
        assert counts.max() - counts.min() <= 1
        assert 2000 < len(sample) <= 4096


def test_histogram_against_counting():
    values = torch.tensor([-2.0, -1.0, -0.6, 0.1, 0.1, 0.99, 1.5, 9.0]).view(2, 4)
    assert histogram(values, -1.0, 1.0, 4).tolist() == [1, 2, 0, 2, 1, 2]
    assert histogram(values, -1.0, 1.0, 4).sum() == values.numel()
