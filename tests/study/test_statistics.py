"""Comparisons of arms against scipy, statsmodels and numerical integration, and what happens without any spread."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pytest
from scipy import integrate, stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from lit_adapters.errors import AdapterError
from lit_adapters.study.statistics import compare, holm, interval, two_way_bootstrap


def two_arms(sets, seed=0, gain=0.5):
    random = np.random.default_rng(seed)
    a = random.normal(60, 1, sets)
    return a, a - random.normal(gain, 0.6, sets)


def crossed(sets, items, seed=0, set_sd=0.5, item_sd=3.0, rest_sd=2.0):
    """Values of two arms, set by item: their differences have an effect of the set, of the item, and a rest."""
    random = np.random.default_rng(seed)
    b = random.normal(60, 5, (sets, items))
    effects = random.normal(0, set_sd, (sets, 1)) + random.normal(0, item_sd, items)
    return b + effects + random.normal(0, rest_sd, (sets, items)), b


@pytest.mark.parametrize("sets", [3, 4, 8, 25])
def test_without_items_the_numbers_are_those_of_scipy_and_statsmodels(sets):
    a, b = two_arms(sets)
    found = compare(a, b, margin=1.0)
    test = stats.ttest_rel(a, b)
    expected = test.confidence_interval()
    assert found.difference == pytest.approx((a - b).mean())
    assert (found.t, found.t_p) == pytest.approx((test.statistic, test.pvalue))
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.t_low, found.t_high) == pytest.approx((expected.low, expected.high))
    assert found.p_equivalent == pytest.approx(ttost_paired(a, b, -1.0, 1.0)[0], rel=1e-9)
    effect = TTestPower().solve_power(nobs=sets, alpha=0.05, power=0.8)
    assert found.detectable == pytest.approx(effect * found.sd, rel=1e-5)
    assert (found.n, found.item_error, found.shared_item_error) == (sets, None, 0)


def test_parts_of_the_error_are_those_of_the_analysis_of_variance():
    items_a, items_b = crossed(4, 12)
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b)
    sets, items = np.indices((4, 12))
    table = pandas.DataFrame({"d": (items_a - items_b).ravel(), "s": sets.ravel(), "i": items.ravel()})
    squares = anova_lm(ols("d ~ C(s) + C(i)", table).fit())["mean_sq"]
    assert found.set_error**2 == pytest.approx(squares["C(s)"] / 48)
    assert found.shared_item_error**2 == pytest.approx((squares["C(i)"] - squares["Residual"]) / 48)
    assert found.item_error**2 == pytest.approx(squares["C(i)"] / 48)


@pytest.mark.parametrize(("sets", "set_sd"), [(2, 0.5), (3, 0.05), (5, 3.0)])
def test_interval_and_p_follow_from_the_sum_of_t_and_normal(sets, set_sd):
    items_a, items_b = crossed(sets, 300, set_sd=set_sd)
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b, margin=1.0)

    def above(x):
        """The probability that the sum is above x, by integrating over the normal part."""

        def part(z):
            return stats.t.sf((x - found.shared_item_error * z) / found.set_error, sets - 1) * stats.norm.pdf(z)

        return integrate.quad(part, -10, 10, points=[x / found.shared_item_error], limit=200)[0]

    assert found.shared_item_error > 0.1
    assert above(found.high - found.difference) == pytest.approx(0.025, rel=1e-5)
    assert found.difference - found.low == pytest.approx(found.high - found.difference)
    assert found.p == pytest.approx(2 * above(abs(found.difference)), rel=1e-5)
    assert found.p_equivalent == pytest.approx(max(above(1 - found.difference), above(1 + found.difference)), rel=1e-5)
    assert found.p >= found.t_p


def test_where_sets_share_no_item_effect_the_paired_t_is_left():
    items_a, items_b = crossed(5, 200, item_sd=0, seed=1)
    items_a -= (items_a - items_b).mean(0) - (items_a - items_b).mean()  # less than chance gives
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b)
    assert found.shared_item_error == 0
    assert (found.low, found.high) == pytest.approx((found.t_low, found.t_high))


def test_more_sets_do_not_take_away_the_error_from_items():
    items_a, items_b = crossed(200, 100)
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b)
    assert found.high - found.low > 5 * (found.t_high - found.t_low)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.item_error, rel=0.05)


def test_swapped_arms_turn_the_signs():
    items_a, items_b = crossed(4, 50)
    one = compare(items_a.mean(1), items_b.mean(1), items_a, items_b)
    other = compare(items_b.mean(1), items_a.mean(1), items_b, items_a, better="lower")
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))
    assert (other.t_low, other.t, other.p) == pytest.approx((-one.t_high, -one.t, one.p))
    assert (one.gain, other.gain) == pytest.approx((one.difference, one.difference))


def test_power_at_the_detectable_difference_is_80_percent():
    items_a, items_b = crossed(4, 300, set_sd=0.4)
    planned = compare(items_a.mean(1), items_b.mean(1), items_a, items_b)
    random = np.random.default_rng(0)
    sets = planned.detectable + random.standard_normal((4, 2000)) * planned.set_error * 2
    differences = sets.mean(0) + random.standard_normal(2000) * planned.shared_item_error
    spread = sets.std(0, ddof=1) / 2
    normal = stats.norm.ppf((np.arange(200) + 0.5) / 200)[:, None]
    p = 2 * stats.t.sf((abs(differences) - planned.shared_item_error * normal) / spread, 3).mean(0)
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_one_set_has_no_test():
    items_a, items_b = crossed(1, 40)
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b, margin=1.0)
    assert found.difference == pytest.approx((items_a - items_b).mean())
    none = ("low", "high", "p", "sd", "set_error", "t", "t_p", "t_low", "t_high", "p_equivalent", "detectable")
    assert all(math.isnan(getattr(found, name)) for name in none)
    assert found.item_error == pytest.approx(stats.sem((items_a - items_b)[0]))
    assert [math.isnan(v) for v in interval([61.0])] == [False, True, True]


def test_equal_differences_have_no_test():
    """Two sets of 400 items often differ equally; that is no proof."""
    found = compare([0.61, 0.64], [0.60, 0.63], margin=1.0)
    assert found.difference == pytest.approx(0.01)
    assert found.sd == 0
    assert all(math.isnan(v) for v in (found.p, found.t_p, found.low, found.t_low, found.p_equivalent))


@pytest.mark.parametrize("with_items", [False, True])
def test_identical_runs_do_not_differ(with_items):
    values, _ = crossed(3, 20)
    items = (values, values) if with_items else ()
    found = compare(values.mean(1), values.mean(1), *items, margin=1.0)
    assert (found.difference, found.low, found.high, found.p, found.t_p, found.p_equivalent) == (0, 0, 0, 1, 1, 0)
    assert holm([found])[0].p_holm == 1


def test_arms_that_fail_on_other_items_are_not_identical():
    items_a, items_b = np.array([[1, 0, 1, 1], [0, 1, 1, 1]]), np.array([[0, 1, 1, 1], [1, 0, 1, 1]])
    found = compare(items_a.mean(1), items_b.mean(1), items_a, items_b, margin=1.0)
    assert found.difference == 0
    assert math.isnan(found.p)
    assert math.isnan(found.p_equivalent)


def test_holm_is_that_of_statsmodels():
    found = [compare(*two_arms(6, seed, gain)) for seed, gain in enumerate((1.5, 0.9, 0.1))]
    expected = multipletests([c.p for c in found], method="holm")[1]
    assert [c.p_holm for c in holm(found)] == pytest.approx(list(expected))
    assert [c.t_p_holm for c in holm(found)] == pytest.approx(list(expected), rel=1e-6)


def test_equivalence_is_corrected_too():
    draw = np.random.default_rng(0)
    pairs = [(draw.normal(0, 0.3, 8), draw.normal(0, 0.3, 8)) for _ in range(4)]
    found = [compare(*pair, margin=0.6) for pair in pairs]
    expected = multipletests([c.p_equivalent for c in found], method="holm")[1]
    assert [c.p_equivalent_holm for c in holm(found)] == pytest.approx(list(expected))
    assert holm([compare(*pairs[0])])[0].p_equivalent_holm is None


def test_contrasts_without_runs_or_test_count_in_holm():
    one, untested = compare(*two_arms(6)), compare([1.0], [2.0])
    assert holm([one], family=4)[0].p_holm == pytest.approx(4 * one.p)
    tested, nothing = holm([one, untested])
    assert tested.p_holm == pytest.approx(2 * one.p)
    assert math.isnan(nothing.p_holm)
    assert holm([]) == []
    with pytest.raises(AdapterError, match="family 1 is smaller than the 2 comparisons"):
        holm([one, untested], family=1)


def test_interval_of_one_arm():
    values, _ = crossed(5, 30)
    mean, low, high = interval(values.mean(1))
    expected = stats.ttest_1samp(values.mean(1), 0).confidence_interval()
    assert (mean, low, high) == pytest.approx((values.mean(), expected.low, expected.high))
    _, wider_low, wider_high = interval(values.mean(1) * 0 + values.mean() + [-0.1, 0, 0.1, 0, 0])
    assert wider_high - wider_low < high - low


def test_bootstrap_has_its_exact_variance():
    items_a, items_b = crossed(30, 40)
    differences = items_a - items_b
    low, high = two_way_bootstrap(differences, resamples=20_000)
    centre_sets, centre_items = np.eye(30) - 1 / 30, np.eye(40) - 1 / 40
    totals, by_item = differences.sum(1), differences.sum(0)
    variance = totals @ centre_sets @ totals + by_item @ centre_items @ by_item
    variance += np.trace(centre_sets @ differences @ centre_items @ differences.T)
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(variance) / 1200, rel=0.03)
    assert (high + low) / 2 == pytest.approx(differences.mean(), abs=0.1)
    assert two_way_bootstrap(differences, 100, seed=1) != two_way_bootstrap(differences, 100, seed=2)


def test_errors_name_the_value():
    a, b = two_arms(4)
    items = np.repeat(a[:, None], 5, 1)
    spoilt = items.copy()
    spoilt[2, 3] = math.nan
    with pytest.raises(AdapterError, match=r"b\[1\] is nan"):
        compare(a, [1.0, math.nan, 1.0, 1.0])
    with pytest.raises(AdapterError, match=r"a\[0\] is inf"):
        compare([math.inf], [1.0])
    with pytest.raises(AdapterError, match="a has 4 training sets and b 3"):
        compare(a, b[:3])
    with pytest.raises(AdapterError, match="one value for each training set"):
        compare([], [])
    with pytest.raises(AdapterError, match="items are given for one arm only"):
        compare(a, b, items)
    with pytest.raises(AdapterError, match=r"items_b has shape \(3, 5\).*4 sets"):
        compare(a, a, items, items[:3])
    with pytest.raises(AdapterError, match="items_a has 5 items and items_b 4"):
        compare(a, a, items, items[:, :4])
    with pytest.raises(AdapterError, match=r"items_a\[2, 3\] \(set, item\) is nan"):
        compare(a, a, spoilt, items)
    with pytest.raises(AdapterError, match=r"mean of items_b\[0\] is 0\.6.* and the metric 6.*times its scale"):
        compare(a, a, items, items / 100)
    with pytest.raises(AdapterError, match="margin 0 must be a number above 0"):
        compare(a, b, margin=0)
    with pytest.raises(AdapterError, match="finite numbers of shape"):
        two_way_bootstrap(spoilt)
