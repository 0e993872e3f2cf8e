"""Speed has not been lost: ratios measured in one process, at most 1.3 times those that docs/performance.md states.

Another program on the machine can double a ratio for a second. A loss of speed is in every attempt, so the best of a
few counts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.against_peft import step_of
from benchmarks.rational_speed import SHAPES, variants
from benchmarks.results_file import RESULTS, load
from benchmarks.timing import alternate, ratios

SLACK = 1.3
ROUNDS = 11
ATTEMPTS = 6


def stated(file: str, field: str, **key: object) -> float:
    """The latest ratio of the records that have these values."""
    records = [r for r in load(RESULTS / f"{file}.json") if key.items() <= r.items()]
    return records[-1][field]["median"]


def assert_within(limit: float, functions: dict[str, Callable[[], object]], name: str, other: str) -> None:
    """The median ratio of `name` to `other` is at most `limit`, in one of the attempts."""
    found: list[float] = []
    while min(found, default=limit + 1) > limit and len(found) < ATTEMPTS:
        found.append(ratios(alternate(functions, ROUNDS)[1], name, other)["median"])
    assert min(found) <= limit, f"{name} takes {found} times as long as {other}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_beside_pefts(method):
    rest = (method, 8, "fp32", False)
    steps = {library: step_of("layer", library, *rest) for library in ("ours", "peft")}
    limit = SLACK * stated(
        "against_peft", "ratio", model="layer", method=method, rank=8, precision="fp32", checkpointing=False
    )
    assert_within(limit, steps, "ours", "peft")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rational", "without coefficient gradients", "groups of 24 channels", "anchored"])
def test_the_rational_function_beside_gelu(variant):
    x = torch.randn(SHAPES["float32"])  # another size would have another ratio
    functions = variants(x, torch.randn_like(x))
    limit = SLACK * stated("rational_speed", "over_gelu", variant=variant, dtype="float32", device="cpu")
    faster = next(r["faster"] for r in reversed(load(RESULTS / "rational_speed.json")) if r["dtype"] == "float32")
    assert_within(limit, {name: functions[name] for name in (faster, variant)}, variant, faster)
