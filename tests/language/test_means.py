"""Means over batches, modes and processes."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.utilities import dim_zero_sum

from language.means import Means


def test_every_value_counts_the_same():
    torch.manual_seed(0)
    values = {"loss": torch.randn(9), "kl": torch.randn(5)}
    means = Means("loss", "kl")
    for a, b, c in ((0, 4, 0), (4, 9, 5)):
        means.update({"loss": values["loss"][a:b], "kl": values["kl"][c:]})
    found = means.compute()
    assert list(found) == ["loss", "kl"]
    for name, expected in values.items():
        assert found[name].item() == pytest.approx(expected.mean().item(), rel=1e-6)
    means.reset()
    means.update({"loss": torch.ones(2), "kl": torch.zeros(1)})
    assert means.compute() == {"loss": 1.0, "kl": 0.0}


def test_processes_add_up():
    assert all(r is dim_zero_sum for metric in Means("loss").metrics for r in metric._reductions.values())


def test_sums_keep_float32_in_a_module_that_is_cast():
    means = torch.nn.Sequential(Means("loss")).to(torch.bfloat16)[0]
    for value in (2.3, 4.6):
        for _ in range(1000):
            means.update({"loss": torch.full((64,), value, dtype=torch.bfloat16)})
    assert means.compute()["loss"].item() == pytest.approx(3.45, rel=1e-2)
    assert means.metrics[0].mean_value.dtype == torch.float32


def test_a_value_that_is_no_number_is_not_left_out():
    means = Means("loss")
    means.update({"loss": torch.tensor([1.0, float("nan")])})
    assert math.isnan(means.compute()["loss"])


def test_what_inference_mode_resets_can_be_written_to_outside_it():
    means = Means("loss")
    with torch.inference_mode():
        means.update({"loss": torch.ones(1)})
        means.compute()
        means.reset()
    means.update({"loss": torch.full((1,), 2.0, requires_grad=True)})
    assert means.compute()["loss"] == 2.0
    assert not means.compute()["loss"].requires_grad
