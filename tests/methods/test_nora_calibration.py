"""NoRA's densities and fit ranges from real inputs, and the density-normalised updates that stand on them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lit_adapters as la


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), activation or nn.GELU(), nn.Linear(24, 2))


def batches(count: int = 3, scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(400, 6, generator=generator) + 1 for _ in range(count)]


def pre_activations(model: nn.Sequential, data: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model[0](x) for x in data])


def test_calibration_takes_range_and_density_from_the_inputs():
    model = network()
    la.attach(model, la.NoRA(groups=4, fit_range="calibrate"))
    data = batches(scale=6.0)
    la.calibrate(model, data)
    values = pre_activations(model, data).flatten().double()
    low, high = torch.quantile(values, torch.tensor([5e-4, 1 - 5e-4]).double()).tolist()
    assert model[1].fit_range.tolist() == pytest.approx([low, high], abs=0.3)
    assert model[1].grid_range.tolist() == model[1].fit_range.tolist()
    assert model[1].density.sum().item() == pytest.approx(1)
    grid = torch.linspace(low, high, 256).double()
    assert (model[1].density.double() * grid).sum().item() == pytest.approx(values.mean().item(), abs=0.1)
    assert model[1].calibrated

    preset = network()
    la.attach(preset, la.NoRA(groups=4))
    x = values.view(-1, 24)
    errors = [(m[1](x) - F.gelu(x)).square().mean().sqrt() for m in (model, preset)]
    assert errors[0] < 0.7 * errors[1]


def test_calibration_with_a_given_range_keeps_the_fit_and_takes_the_density():
    model, plain = network(), network()
    for m in (model, plain):
        la.attach(m, la.NoRA(groups=4))
    la.calibrate(model, batches())
    assert torch.equal(model[1].base_numerator, plain[1].base_numerator)
    assert model[1].fit_range.tolist() == [-6.0, 6.0]
    assert not torch.allclose(model[1].numerator_scale, plain[1].numerator_scale)


@pytest.mark.parametrize("form", ["abs-of-sum", "sum-of-abs"])
@pytest.mark.parametrize("base", ["rational", "anchored"])
def test_a_step_along_any_coefficient_moves_the_function_alike(form, base):
    """One Adam step of lr along a single coefficient: the same rms on the calibration data, lr times the scale."""
    lr, scale, data = 1e-3, 0.3, batches()
    moves = {}
    for part, width in (("numerator_delta", 6), ("denominator_delta", 4)):
        for index in range(width):
            model = network()
            config = la.NoRA(
                groups=1, rank=None, denominator=form, base=base, scale=scale, fit_range="calibrate", alpha=99.0
            )
            la.attach(model, config)
            la.calibrate(model, data)
            model.double()
            x = pre_activations(model, [b.double() for b in data])
            before = model[1](x)
            parameter = getattr(model[1], part)
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad[0, index] = 1.0
            torch.optim.Adam([parameter], lr=lr).step()
            moves[part, index] = (model[1](x) - before).square().mean().sqrt().item()
    # The density was measured on a subsample.
    assert list(moves.values()) == pytest.approx([lr * scale] * 10, rel=0.02)


def test_without_calibration_the_density_is_normal_with_deviation_two():
    model = network()
    la.attach(model, la.NoRA(groups=4, scale=0.3))
    x = 2 * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = model[1].base_numerator.double(), model[1].base_denominator.double()
    p = sum(a[i] * x**i for i in range(6))
    q = 1 + sum(b[j] * x ** (j + 1) for j in range(4)).abs()
    numerator = [(x**i / q).square().mean().sqrt().item() for i in range(6)]
    denominator = [(x ** (j + 1) * p / q**2).square().mean().sqrt().item() for j in range(4)]
    assert (0.3 / model[1].numerator_scale).tolist() == pytest.approx(numerator, rel=0.03)
    assert (0.3 / model[1].denominator_scale).tolist() == pytest.approx(denominator, rel=0.03)


def test_published_scaling_is_one():
    model = network()
    la.attach(model, la.NoRA(groups=4, scaling="none"))
    la.calibrate(model, batches())
    assert model[1].numerator_scale.eq(1).all()
    assert model[1].denominator_scale.eq(1).all()


def test_training_without_the_calibration_asked_for_is_refused_and_evaluating_is_not():
    model, x = network(), batches()[0]
    la.attach(model, la.NoRA(groups=4, fit_range="calibrate"))
    with pytest.raises(la.AdapterError, match=r"'1' has fit_range='calibrate'.*la?.*calibrate\("):
        model.train()(x)
    model.eval()(x)
    with la.disabled(model):
        model.train()(x)
    la.calibrate(model, batches())
    model.train()(x)


def test_calibrating_after_training_began_is_refused_and_changes_nothing():
    model = network()
    la.attach(model, la.NoRA(groups=4))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-6)
    model(batches()[0]).square().sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(la.AdapterError, match="'1' has been trained"):
        la.calibrate(model, batches())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_travels_with_the_state_and_is_not_asked_for_again(tmp_path):
    config = la.NoRA(groups=4, fit_range="calibrate")
    model = network()
    la.attach(model, config)
    la.calibrate(model, batches())
    la.save_adapters(model, tmp_path)

    loaded = network()
    la.load_adapters(loaded, tmp_path)
    resumed = network()
    la.attach(resumed, config)
    assert resumed[1].awaits_calibration
    resumed.load_state_dict(model.state_dict())
    for other in (loaded, resumed):
        assert not other[1].awaits_calibration
        other.train()(batches()[0])
        assert torch.equal(other[1].fit_range, model[1].fit_range)
        assert torch.equal(other[1].density, model[1].density)

    uncalibrated = network()
    la.attach(uncalibrated, config)
    resumed.load_state_dict(uncalibrated.state_dict())
    assert resumed[1].awaits_calibration


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * float("nan"), "'1' are empty or not finite"),
        (lambda x: x * float("inf"), "'1' are empty or not finite"),
        (lambda x: torch.zeros_like(x), "'1' are constant"),
    ],
    ids=["nan", "inf", "constant"],
)
@pytest.mark.parametrize("fit_range", [(-6.0, 6.0), "calibrate"])
def test_inputs_that_say_nothing_are_refused(spoil, message, fit_range):
    model = network()
    nn.init.constant_(model[0].weight, 0.1)
    nn.init.constant_(model[0].bias, 0.5)
    la.attach(model, la.NoRA(groups=4, fit_range=fit_range))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(la.AdapterError, match=message):
        la.calibrate(model, [spoil(x) for x in batches()])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batches_of_every_kind():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = network()

        def forward(self, x, scale=1.0):
            return self.mlp(x * scale)

    kinds = ([{"x": b} for b in batches()], [(b,) for b in batches()], [[b, 1.0] for b in batches()], iter(batches()))
    densities = []
    for kind in kinds:
        model = Net()
        la.attach(model, la.NoRA(groups=4))
        la.calibrate(model, kind)
        densities.append(model.mlp[1].density)
    assert all(torch.equal(d, densities[0]) for d in densities)


def test_misuse_is_named():
    model = network()
    with pytest.raises(la.AdapterError, match="no adapters"):
        la.calibrate(model, batches())
    la.attach(model, la.NoRA(groups=4))
    with pytest.raises(la.AdapterError, match="no input reached '1'"):
        la.calibrate(model, [])
    for single in (batches()[0], {"x": batches()[0]}):
        with pytest.raises(la.AdapterError, match=r"put a single batch into a list"):
            la.calibrate(model, single)


def test_calibration_leaves_modes_random_state_and_running_statistics_alone():
    model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.GELU(), nn.Linear(24, 2))
    la.attach(model, la.NoRA(groups=4))
    model.train()
    model[2].eval()
    statistics, state = model[1].running_mean.clone(), torch.get_rng_state()
    la.calibrate(model, batches())
    assert [m.training for m in model] == [True, True, False, True, True]
    assert model[3].base.training
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_default_device_does_not_matter():
    """Calibration computes on the CPU wherever new tensors go by default."""
    plain, other, data = network(), network(), batches()
    la.attach(plain, la.NoRA(groups=4, fit_range="calibrate"))
    la.calibrate(plain, data)
    with torch.device("meta"):
        la.attach(other, la.NoRA(groups=4, fit_range="calibrate"))
        la.calibrate(other, data)
        assert all(t.device.type == "cpu" for t in other[1].functions())
    assert torch.equal(plain[1].base_numerator, other[1].base_numerator)
    assert torch.equal(plain[1].numerator_scale, other[1].numerator_scale)
