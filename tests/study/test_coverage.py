"""Simulated studies: how often intervals hold the known difference, and how often tests find what is not there.

Arms are right or wrong on each test item, by a hidden value above 0: the ease of the item, which all arms share, the
arm's own strength on the item, an effect of the training set, and noise of each run on each item.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lit_adapters.study.statistics import compare, holm, interval, two_way_bootstrap

pytestmark = pytest.mark.slow

ITEMS = 1000
ACCURACY = 60.0


def simulate(random, sets, set_sd, gains, apart=0.2, items=ITEMS):
    """Right and wrong (100 and 0), shape (arms, sets, items), of arms with known mean accuracies.

    Args:
        random: The generator.
        sets: How many.
        set_sd: What the training set changes in the difference of two arms: the standard deviation, in points.
        gains: How far the true accuracy of each arm is above `ACCURACY`, in points.
        apart: The part of the hidden value that is the arm's own, half of it on the item and half of it by run; 0.2 has
            about 20% of the items right in one of two arms alone.
        items: How many.
    """
    arms = len(gains)
    wanted = stats.norm.ppf((ACCURACY + np.asarray(gains)) / 100)
    effect = set_sd / 100 / np.sqrt(2) / stats.norm.pdf(wanted[0])
    hidden = (wanted * np.sqrt(1 + effect**2))[:, None, None] + random.normal(0, effect, (arms, sets, 1))
    hidden = hidden + random.normal(0, np.sqrt(0.9 - apart), items) + random.normal(0, np.sqrt(0.1), (sets, items))
    hidden += random.normal(0, np.sqrt(apart / 2), (arms, 1, items))
    hidden += random.normal(0, np.sqrt(apart / 2), (arms, sets, items))
    return 100.0 * (hidden > 0)


def contrast(right, first, second, margin=None):
    a, b = right[first], right[second]
    return compare(a.mean(1), b.mean(1), a, b, margin=margin)


@pytest.mark.parametrize("set_sd", [0.5, 2.5, 6.0], ids=["items decide", "both decide", "sets decide"])
@pytest.mark.parametrize("sets", [3, 4, 5, 8])
def test_intervals_hold_the_true_difference_in_95_of_100_studies(sets, set_sd):
    random = np.random.default_rng(sets)
    held = []
    for _ in range(300):
        right = simulate(random, sets, set_sd, (3, 0))
        found = contrast(right, 0, 1)
        _, low, high = interval(right[1].mean(1), right[1])
        held.append((found.low <= 3 <= found.high, low <= ACCURACY <= high))
    for share in np.mean(held, 0):
        assert 0.93 <= share <= 0.99


def test_percentiles_of_the_bootstrap_do_not():
    random = np.random.default_rng(0)
    held = []
    for _ in range(150):
        right = simulate(random, 3, 15.0, (0, 0), items=200)
        low, high = two_way_bootstrap(right[0] - right[1], resamples=400)
        held.append(low <= 0 <= high)
    assert np.mean(held) < 0.85


@pytest.mark.parametrize("sets", [4, 8])
def test_holm_finds_nothing_where_nothing_is(sets):
    """Six contrasts among seven equal arms: any finding is false. The paired t knows nothing of the choice of items."""
    random = np.random.default_rng(sets)
    pairs = [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (5, 6)]
    wrong = []
    for _ in range(150):
        right = simulate(random, sets, 1.0, (0,) * 7)
        found = holm([contrast(right, *pair) for pair in pairs])
        wrong.append((min(c.p_holm for c in found) < 0.05, min(c.t_p_holm for c in found) < 0.05))
    two_way, paired = np.mean(wrong, 0)
    assert two_way <= 0.06
    assert paired > 2 * two_way


@pytest.mark.parametrize("sets", [3, 8])
def test_arms_as_far_apart_as_the_margin_are_seldom_called_equivalent(sets):
    random = np.random.default_rng(sets)
    at_margin, equal = [], []
    for _ in range(300):
        right = simulate(random, sets, 0.5, (6, 0, 0))
        at_margin.append(contrast(right, 0, 1, margin=6).p_equivalent < 0.05)
        equal.append(contrast(right, 1, 2, margin=6).p_equivalent < 0.05)
    assert 0 < np.mean(at_margin) <= 0.07
    assert np.mean(equal) > 0.5
