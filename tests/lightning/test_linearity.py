"""The warning for LoRAN's functions that are linear at the size that B A has, and the statistics behind it."""

import math
import warnings

import pytest
import torch
from torch import nn

import lit_adapters as la
from tests.lightning.tiny_task import Task, fit, loader, tensorboard
from tests.methods.loran_layer import layer

BFLOAT16 = {"precision": "bf16-mixed"}


def warned(tmp_path, method: la.Method, **changes) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Task([method], lr=1e-3), data=loader(40), **changes)
    return [str(w.message) for w in caught if "are linear" in str(w.message)]


def test_sinter_at_its_published_constants_is_linear_to_bfloat16(tmp_path):
    (text,) = warned(tmp_path, la.LoRAN(rank=2, frequency=1e5), **BFLOAT16)
    assert text.startswith("step 10: 4 of 4 adapters of the method loran are linear so far: in 'blocks.0.fc1', all")
    assert "is a multiple of BA, and bfloat16 resolves 3.9e-03" in text
    assert "frequency='calibrate'" in text


def test_a_frequency_that_is_too_low_for_the_size_of_the_product(tmp_path):
    (text,) = warned(tmp_path, la.LoRAN(rank=2, function="sine", frequency=20.0))
    assert "w rms(BA) is " in text


@pytest.mark.parametrize(
    "method",
    [
        la.LoRAN(rank=2, function="sine", frequency="calibrate"),
        la.LoRAN(rank=2, amplitude=1.0, frequency="calibrate"),
        la.LoRAN(rank=2, function="relu", start_size=0.01),
        la.LoRAN(rank=2, function="identity"),
    ],
)
def test_what_is_nonlinear_or_linear_by_choice(tmp_path, method):
    assert warned(tmp_path, method, **BFLOAT16) == []


def test_the_share_and_the_phase_are_logged(tmp_path):
    method = la.LoRAN(rank=2, function="sine", frequency="calibrate")
    written = tensorboard(tmp_path, Task([method]))
    tag = "adapter/loran/blocks.0.fc1/"
    assert [round(e.value, 5) for e in written.Scalars(tag + "phase")][-1] == 1
    assert 0.1 < written.Scalars(tag + "nonlinear_share")[-1].value < 1
    assert math.isfinite(written.Scalars(tag + "frequency")[-1].value)


def test_the_share_by_definition():
    adapter = layer(nn.Linear(30, 40), function="sinter", amplitude=0.3, frequency=2.0)
    z = adapter.product(torch.float64)
    f = (z + 0.3 * z * torch.sin(2 * z)).flatten()
    z = z.flatten()
    expected = (f - z * (z @ f) / (z @ z)).norm() / f.norm()
    assert adapter.nonlinear_share() == pytest.approx(expected.item(), rel=1e-9)
    assert adapter.phase() == pytest.approx(2 * z.square().mean().sqrt().item(), rel=1e-9)
    with torch.no_grad():
        adapter.lora_B.zero_()
    assert (adapter.nonlinear_share(), adapter.phase(), adapter.nearly_linear()) == (0.0, 0.0, "")


def test_inspect_warns_too(run, tmp_path):
    network = nn.Sequential(nn.Linear(12, 8))
    for frequency, expected in ((1e4, True), ("calibrate", False)):
        la.attach(network, la.LoRAN(rank=2, amplitude=5e-5 if expected else 1.0, frequency=frequency))
        with torch.no_grad():
            network[0].lora_B.normal_(std=1e-3)
        la.save_adapters(network, tmp_path / str(frequency))
        printed = run("inspect", tmp_path / str(frequency))
        assert ("warning: 1 layers of a nonlinear method do what LoRA does; in '0', all but" in printed) == expected
        la.detach(network)
