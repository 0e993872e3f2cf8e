"""Comparisons of two arms over training sets and test items, and what each number means.

A unit is one training set: its value is the mean over the seeds that ran on it. (A study with one training set and
several seeds has the seeds as units, and then says nothing about other training sets.) Both arms ran on the same units,
so that all numbers come from the differences of pairs, first arm minus second, and a positive difference means that the
first arm's value is higher. `Comparison.gain` has the sign of the metric: positive where the first arm is better.

Two things are drawn by chance: the training sets and the test items. With `d[s, i]` the difference on set `s` and item
`i`, of `S` sets and `I` items,

    set_error^2         = sd^2 / S                       sd: standard deviation of the S differences
    shared_item_error^2 = (MS_items - MS_rest) / (S I)   0 if negative

where `MS_items` and `MS_rest` are the mean squares of the two-way analysis of variance. `shared_item_error` is what
more training sets would not reduce, as all of them meet the same test items. What varies with set and item together is
in `sd` already. The set part has `S - 1` degrees of freedom and the item part thousands, so that no single t
distribution fits. The true difference is taken to lie around the measured one as

    set_error * T(S - 1) + shared_item_error * N(0, 1)

with T and N independent (the Behrens-Fisher distribution). The interval, `p`, `p_equivalent` and `detectable` all
follow from it. Without items it is the paired t, and the numbers equal those of scipy and statsmodels.

In plain words:

- `low`, `high`: In 95 of 100 studies such an interval holds the true difference, that over all training sets and test
  items of this kind.
- `p`: How often a study without any true difference would show one at least this large. Below 0.05 exactly when the
  interval leaves out 0.
- `p_holm`: `p` corrected for the number of contrasts named beforehand. In at most 5 of 100 studies it is below 0.05 for
  any contrast without a true difference.
- `p_equivalent`: Below 0.05 says that the true difference is smaller than the margin in size (two one-sided tests). A
  large `p` alone does not say that. `p_equivalent_holm`: the same corrected as `p_holm` is: in at most 5 of 100 studies
  it is below 0.05 for any contrast whose true difference is as large as the margin.
- `detectable`: The smallest true difference that a study with this many sets and this spread finds with a probability
  of 80% (two-sided, 5%, before Holm). Where no difference was seen, smaller ones may exist. It comes from the measured
  spread, so that with few sets it is itself rough.
- `t`, `t_p`, `t_p_holm`, `t_low`, `t_high`: The paired t test over sets. It holds for these very test items only: as
  a statement on new items it finds differences that are not there (measured below).
- `item_error`: The error of the difference from the choice of items, with these very sets.

With one set the spread over sets is not known, and with equal differences on all sets it is 0. Then there is no test
and no interval: these numbers are NaN. If runs are identical (every difference 0), the interval is [0, 0] and `p` is 1.

Why this is not the percentile interval of the two-way bootstrap (sets and items resampled independently): where sets
decide, that interval lies between the smallest and the largest difference, which enclose the true one in 75 of 100
studies with three sets, and in 94 with five. Where items decide it is too wide, as it counts what varies with set and
item together three times. This is how often each interval held the true difference in 1500 simulated studies (300 for
the bootstrap) of two arms, right or wrong on 1000 items, at 60% accuracy, with 20% of the items right in one arm alone;
sd is what the training set changes in a difference, in points, and the shared error from items is 0.7 points:

    sets               |         3         |         4         |         5         |         8
    sd                 |  0.5   2.5   10   |  0.5   2.5   10   |  0.5   2.5   10   |  0.5   2.5   10
    bootstrap          | .987  .913  .747  | .987  .933  .810  | .980  .937  .870  | .980  .937  .900
    paired t           | .905  .947  .949  | .880  .937  .943  | .857  .931  .949  | .782  .905  .950
    t of Satterthwaite | .929  .928  .939  | .947  .938  .939  | .943  .944  .945  | .945  .947  .951
    this interval      | .962  .962  .951  | .973  .959  .948  | .961  .963  .953  | .953  .960  .954

With six contrasts of equal arms, `p_holm` was below 0.05 for any in 2 to 4 of 100 studies of 3 to 8 sets, and
`t_p_holm` in 4 to 36. Arms exactly a margin apart were called equivalent in 3 to 6. The limit: if the differences of
sets are strongly skewed (near 100% accuracy, with large effects of the set), that was 9 of 100; it was 9 to 10 with the
paired t too.

`bootstrap` has these percentiles, for readers who want to see both. We found no library with a two-way interval for few
sets. The paired t test comes from scipy and Holm's procedure from statsmodels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

from lit_adapters.errors import AdapterError

LEVEL = 0.95  # of intervals
POWER = 0.8  # with which a difference is "detectable"
_ROUNDING = 1e-6  # A spread of differences below this share of the values is rounding of logged values (float32).
_ITEMS_AGREE = 1e-3  # Means of items and the metric may differ by this share: logged values are rounded.
_NODES = 256
_BISECTIONS = 45

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """The difference of two arms; the head of the file says what each number means.

    All values have the unit of the metric, but for probabilities and `t`. Where no test is possible they are NaN.

    Attributes:
        difference: The mean of first minus second over sets.
        low: The lower end of the 95% interval, over training sets and test items (over sets alone without items).
        high: The upper end.
        p: The p-value of no difference, over sets and items, two-sided.
        sd: The standard deviation of the differences over sets.
        n: The number of sets.
        set_error: The part of the standard error that comes from sets, sd / sqrt(n).
        shared_item_error: The part of the standard error that comes from items and is shared by all sets; 0 without
            items.
        item_error: The standard error from items, given these sets; None without items.
        t: The statistic of the paired t test over sets.
        t_p: Its p-value, which holds for these test items only.
        t_low: The lower end of the 95% interval of the paired t.
        t_high: Its upper end.
        better: Whether higher or lower values are better.
        margin: The margin of the equivalence test; None without one.
        p_equivalent: The p-value of a difference as large as the margin or larger; None without a margin.
        bootstrap: The 2.5 and 97.5 percentiles of the two-way bootstrap; None without items, or if not asked for.
        p_holm: `p` after Holm's procedure; None until `holm` was called.
        t_p_holm: `t_p` after Holm's procedure; None until `holm` was called.
        p_equivalent_holm: `p_equivalent` after Holm's procedure; None until `holm` was called, and without a margin.
    """

    difference: float
    low: float
    high: float
    p: float
    sd: float
    n: int
    set_error: float
    shared_item_error: float
    item_error: float | None
    t: float
    t_p: float
    t_low: float
    t_high: float
    better: Literal["higher", "lower"] = "higher"
    margin: float | None = None
    p_equivalent: float | None = None
    bootstrap: tuple[float, float] | None = None
    p_holm: float | None = None
    t_p_holm: float | None = None
    p_equivalent_holm: float | None = None

    @property
    def gain(self) -> float:
        """The difference, positive where the first arm is better."""
        return self.difference if self.better == "higher" else -self.difference

    @property
    def detectable(self) -> float:
        """The true difference that is found with 80% power at this n and this spread; NaN where no test is possible."""
        if self.n < 2 or not self.set_error > 0:
            return math.nan
        return _detectable(self.set_error, self.shared_item_error, self.n - 1)


@dataclass(frozen=True)
class _Estimate:
    """A mean over sets and items, and the parts of its error."""

    mean: float
    sd: float
    n: int
    set_error: float
    shared_item_error: float
    item_error: float | None
    identical: bool

    @property
    def testable(self) -> bool:
        return self.n > 1 and self.set_error > 0

    def beyond(self, distance: float) -> float:
        """The probability that the true mean is above the measured one by more than `distance`."""
        return float(_tail(np.float64(distance), np.float64(self.set_error), self.shared_item_error, self.n - 1))

    def half_width(self) -> float:
        """Half the width of the interval."""
        return float(_quantile(np.float64(self.set_error), self.shared_item_error, self.n - 1))


def compare(
    a: Sequence[float] | Array,
    b: Sequence[float] | Array,
    items_a: Array | None = None,
    items_b: Array | None = None,
    margin: float | None = None,
    better: Literal["higher", "lower"] = "higher",
    resamples: int = 0,
) -> Comparison:
    """Compare two arms that ran on the same training sets.

    Args:
        a: The metric of the first arm on each set, shape (S,).
        b: That of the second arm, on the same sets in the same order.
        items_a: The values of the first arm for each set and test item, shape (S, I), in the metric's unit. Their mean
            over items is the metric.
        items_b: Those of the second arm, for the same items in the same order.
        margin: Of the equivalence test, in the metric's unit.
        better: Whether higher or lower values are better.
        resamples: Of the two-way bootstrap; 0 leaves it out.

    Raises:
        AdapterError: A value is not finite; the shapes do not fit; the mean of items is not the metric; the margin is
            not above 0; items are given for one arm only.
    """
    first, second = _values(a, "a"), _values(b, "b")
    if len(first) != len(second):
        raise AdapterError(
            f"a has {len(first)} training sets and b {len(second)}; compare the sets that both arms ran on"
        )
    if (items_a is None) != (items_b is None):
        raise AdapterError("items are given for one arm only; give those of both or of none")
    if margin is not None and not 0 < margin < math.inf:
        raise AdapterError(f"margin {margin} must be a number above 0, in the metric's unit")
    size = float(max(np.abs(first).max(), np.abs(second).max()))
    bootstrap = None
    if items_a is None or items_b is None:
        estimate = _estimate(first - second, None, size)
    else:
        both = _items(items_a, first, "items_a"), _items(items_b, second, "items_b")
        if both[0].shape != both[1].shape:
            raise AdapterError(
                f"items_a has {both[0].shape[1]} items and items_b {both[1].shape[1]}; give those of one test split"
            )
        estimate = _estimate(first - second, both[0] - both[1], size)
        bootstrap = two_way_bootstrap(both[0] - both[1], resamples) if resamples and len(first) > 1 else None
    low, high = _interval(estimate)
    p, p_equivalent, t, t_p, t_low, t_high = (math.nan,) * 6
    if estimate.testable:
        p = min(1.0, 2 * estimate.beyond(abs(estimate.mean)))
        test = stats.ttest_rel(first, second)
        t, t_p = float(test.statistic), float(test.pvalue)
        t_low, t_high = (float(end) for end in test.confidence_interval(LEVEL))
        if margin is not None:
            p_equivalent = estimate.beyond(margin - abs(estimate.mean))
    elif estimate.identical:
        p, t_p, t_low, t_high, p_equivalent = 1.0, 1.0, 0.0, 0.0, 0.0
    return Comparison(
        difference=estimate.mean,
        low=low,
        high=high,
        p=p,
        sd=estimate.sd,
        n=estimate.n,
        set_error=estimate.set_error,
        shared_item_error=estimate.shared_item_error,
        item_error=estimate.item_error,
        t=t,
        t_p=t_p,
        t_low=t_low,
        t_high=t_high,
        better=better,
        margin=margin,
        p_equivalent=None if margin is None else p_equivalent,
        bootstrap=bootstrap,
    )


def holm(comparisons: Sequence[Comparison], family: int | None = None) -> list[Comparison]:
    """Set the values of p after Holm's procedure over the contrasts that were named beforehand.

    A contrast without a test (NaN) or without runs counts as one with p = 1, so that the number of contrasts stays what
    was named.

    Args:
        comparisons: Those contrasts that have runs.
        family: How many contrasts were named; as many as there are comparisons by default.

    Raises:
        AdapterError: The family is smaller than the number of comparisons.
    """
    family = len(comparisons) if family is None else family
    if family < len(comparisons):
        raise AdapterError(f"family {family} is smaller than the {len(comparisons)} comparisons; name all contrasts")
    two_way = _holm([comparison.p for comparison in comparisons], family)
    paired = _holm([comparison.t_p for comparison in comparisons], family)
    equivalent = _holm([math.nan if c.p_equivalent is None else c.p_equivalent for c in comparisons], family)
    return [
        replace(c, p_holm=p, t_p_holm=q, p_equivalent_holm=None if c.margin is None else e)
        for c, p, q, e in zip(comparisons, two_way, paired, equivalent, strict=True)
    ]


def interval(values: Sequence[float] | Array, items: Array | None = None) -> tuple[float, float, float]:
    """Return the mean over sets and its 95% interval, over sets and items as in `compare`; NaN with one set.

    Args:
        values: The metric of one arm on each set, shape (S,).
        items: Its values for each set and test item, shape (S, I).

    Raises:
        AdapterError: A value is not finite, the shapes do not fit, or the mean of items is not the metric.
    """
    array = _values(values, "values")
    checked = None if items is None else _items(items, array, "items")
    estimate = _estimate(array, checked, float(np.abs(array).max()))
    return estimate.mean, *_interval(estimate)


def two_way_bootstrap(differences: Array, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 2.5 and 97.5 percentiles of the mean when sets and items are resampled independently.

    With few sets they are not a 95% interval; the head of the file has their measured coverage. `Comparison.low` and
    `high` are the ends of a 95% interval.

    Args:
        differences: For each set and item, shape (S, I).
        resamples: How often to resample.
        seed: Of the random numbers.

    Raises:
        AdapterError: A value is not finite, or the shape is not (S, I).
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise AdapterError(f"differences of shape {array.shape} must be finite numbers of shape (sets, items)")
    sets, items = array.shape
    random = np.random.default_rng(seed)
    at_once = min(resamples, max(1, 320_000 // items))  # the counts below fit the processor's cache
    offsets = np.arange(at_once)[:, None] * items
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = random.integers(0, items, (rows, items)) + offsets[:rows]
        counts = np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items)
        weights = random.multinomial(sets, np.full(sets, 1 / sets), rows)
        means.append(((counts.astype(np.float64) @ array.T) * weights).sum(1) / (sets * items))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _values(values: Sequence[float] | Array, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise AdapterError(f"{name} has shape {array.shape}; give one value for each training set")
    for index in np.flatnonzero(~np.isfinite(array)):
        raise AdapterError(f"{name}[{index}] is {array[index]}; leave out runs that diverged")
    return array


def _items(items: Array, values: Array, name: str) -> Array:
    array = np.asarray(items, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != len(values) or array.shape[1] < 2:
        raise AdapterError(f"{name} has shape {array.shape}; give (sets, items) with {len(values)} sets")
    for place in np.argwhere(~np.isfinite(array)):
        raise AdapterError(f"{name}{place.tolist()} (set, item) is {array[tuple(place)]}; give finite values")
    means = array.mean(1)
    scale = max(float(np.abs(values).max()), float(np.abs(means).max()))
    for index in np.flatnonzero(np.abs(means - values) > _ITEMS_AGREE * scale):
        raise AdapterError(
            f"the mean of {name}[{index}] is {means[index]:.6g} and the metric {values[index]:.6g}; give the items of "
            "this metric, in its unit (times its scale)"
        )
    return array


def _estimate(values: Array, items: Array | None, size: float) -> _Estimate:
    """Split the error of the mean into the parts of sets and of items.

    Args:
        values: For each set.
        items: For each set and item.
        size: Of the values that were subtracted, which decides what is rounding.
    """
    n = len(values)
    sd = float(values.std(ddof=1)) if n > 1 else math.nan
    if sd <= _ROUNDING * size:
        sd = 0.0
    share, error = 0.0, None
    if items is not None:
        by_item = items.mean(0)
        count = items.shape[1]
        error = float(by_item.std(ddof=1)) / math.sqrt(count)
        if n > 1:
            rest = items - by_item - (items.mean(1) - items.mean())[:, None]
            rest_square = float((rest**2).sum()) / ((n - 1) * (count - 1))
            share = math.sqrt(max(0.0, error**2 - rest_square / (n * count)))
    identical = n > 1 and not values.any() and (items is None or not items.any())
    return _Estimate(float(values.mean()), sd, n, sd / math.sqrt(n), share, error, identical)


def _interval(estimate: _Estimate) -> tuple[float, float]:
    if estimate.identical:
        return 0.0, 0.0
    if not estimate.testable:
        return math.nan, math.nan
    half = estimate.half_width()
    return estimate.mean - half, estimate.mean + half


def _holm(p_values: Sequence[float], family: int) -> list[float]:
    if not p_values:
        return []
    known = [1.0 if math.isnan(p) else p for p in p_values] + [1.0] * (family - len(p_values))
    adjusted = multipletests(known, method="holm")[1]
    return [math.nan if math.isnan(p) else float(q) for p, q in zip(p_values, adjusted, strict=False)]


@lru_cache
def _scales(df: int) -> tuple[Array, Array]:
    """Return nodes and weights of 1 / sqrt(chi2(df) / df), whose product with a normal variable follows T(df).

    The trapezoidal rule in the logarithm of chi2 is exact to rounding, as its density is smooth and falls fast at both
    ends.
    """
    logarithm = np.linspace(-90 / df, math.log(df + 12 * math.sqrt(2 * df) + 60), _NODES)
    density = np.exp(df / 2 * (logarithm - math.log(df)) - (np.exp(logarithm) - df) / 2)
    return np.sqrt(df / np.exp(logarithm)), density / density.sum()


def _tail(x: Array | np.float64, set_error: Array | np.float64, shared_item_error: float, df: int) -> Array:
    """The probability that set_error T(df) + shared_item_error N(0, 1) is above `x`; shapes broadcast."""
    scale, weight = _scales(df)
    spread = np.hypot(np.asarray(set_error)[..., None] * scale, shared_item_error)
    return np.asarray(special.ndtr(-np.asarray(x)[..., None] / spread) @ weight)


def _quantile(set_error: Array | np.float64, shared_item_error: float, df: int) -> Array:
    """What set_error T(df) + shared_item_error N(0, 1) exceeds in size with a probability of 5%, by bisection."""
    target = (1 - LEVEL) / 2
    low = np.zeros_like(set_error)
    # The sum is above x + y no more often than one of its parts is above its own share.
    high = set_error * stats.t.isf(target / 2, df) + shared_item_error * stats.norm.isf(target / 2)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = _tail(middle, set_error, shared_item_error, df) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)


def _detectable(set_error: float, shared_item_error: float, df: int) -> float:
    """The true difference at which `p` is below 5% with a probability of 80%, if the measured spread is the true one.

    The spread that such a study measures varies by chance, as sqrt(chi2(df) / df).
    """
    scale, weight = _scales(df)
    needed = _quantile(set_error / scale, shared_item_error, df)
    error = math.hypot(set_error, shared_item_error)

    def missing_power(true: float) -> float:
        found = special.ndtr((true - needed) / error) + special.ndtr((-true - needed) / error)
        return POWER - float(found @ weight)

    return float(optimize.brentq(missing_power, 0, float(needed.max()) + 2 * error))
