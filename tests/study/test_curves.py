"""Reading trainings at equal accuracy."""

from __future__ import annotations

import pytest

from lit_adapters.errors import AdapterError
from lit_adapters.study.curves import at_equal, at_level


def curve(*points, by="acc"):
    return [{"step": step, by: level, "loss": loss} for step, (level, loss) in enumerate(points)]


def test_the_value_is_interpolated_at_the_first_crossing():
    path = [{"step": 0, "loss": 9.0}, *curve((0.2, 3.0), (0.4, 2.0), (0.3, 2.5), (0.6, 1.0))]
    assert at_level(path, "acc", 0.3, "loss") == pytest.approx(2.5)
    assert at_level(path, "acc", 0.4, "loss") == pytest.approx(2.0)
    assert at_level(path, "acc", 0.45, "loss") == pytest.approx(1.75)
    assert at_level(path, "acc", 0.1, "loss") == 3.0
    assert at_level(path, "acc", 0.61, "loss") is None
    falling = curve((3.0, 0.1), (1.0, 0.5), by="perplexity")
    assert at_level(falling, "perplexity", 1.5, "loss", better="lower") == pytest.approx(0.4)


def test_runs_are_read_at_the_best_level_that_both_reach():
    fast, slow = curve((0.2, 3.0), (0.6, 1.0), (0.8, 2.0)), curve((0.1, 3.0), (0.5, 1.8), (0.4, 1.7))
    assert at_equal(fast, slow, "acc", "loss") == pytest.approx((0.5, 1.5, 1.8))
    assert at_equal(slow, fast, "acc", "loss") == pytest.approx((0.5, 1.8, 1.5))
    errors = [[{"error": 1 - p["acc"], "loss": p["loss"]} for p in path] for path in (fast, slow)]
    assert at_equal(*errors, "error", "loss", better="lower") == pytest.approx((0.5, 1.5, 1.8))


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(AdapterError, match=r"both acc and val/loss; validate during the training"):
        at_level(curve((0.1, 1.0)), "acc", 0.1, "val/loss")
    with pytest.raises(AdapterError, match=r"no point of the curve has both"):
        at_level(curve((float("nan"), 1.0)), "acc", 0.1, "loss")
    with pytest.raises(AdapterError, match=r"begins at a better acc than the other reaches \(0.3\)"):
        at_equal(curve((0.5, 1.0), (0.6, 1.0)), curve((0.1, 1.0), (0.3, 1.0)), "acc", "loss")
