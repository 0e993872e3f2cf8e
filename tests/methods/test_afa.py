"""AFA-LoRA: values and gradients in float64, the linear end, the learnable activation, merging, refusals."""

import math

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.schedules import Hold, Linear

# Written out here, independently of the library.
SIGMAS = {
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "tanh": lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "centered_sigmoid": lambda z: 1 / (1 + torch.exp(-z)) - 0.5,
}


def layer(base: nn.Module | None = None, **settings) -> AFAAdapter:
    network = nn.Sequential(nn.Linear(12, 8) if base is None else base)
    la.attach(network, la.AFALoRA(**{"rank": 4, "alpha": 8.0, "targets": ["0"]} | settings))
    ((_, adapter),) = la.adapters(network)
    with torch.no_grad():
        adapter.lora_B.normal_()
    return adapter


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("activation", SIGMAS)
def test_value_and_gradient_against_float64(activation, beta):
    adapter = layer(activation=activation, schedule=Hold(beta))
    x, grad = torch.randn(4, 5, 12, requires_grad=True), torch.randn(4, 5, 8)
    exact = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B)]
    z = exact[0] @ exact[1].T
    code = beta * SIGMAS[activation](z) + (1 - beta) * z
    expected_y = exact[0] @ adapter.weight.double().T + adapter.bias.double() + 2 * code @ exact[2].T
    expected = torch.autograd.grad(expected_y, exact, grad.double())
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], grad)
    for got, want in zip((y, *actual), (expected_y, *expected), strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()


@pytest.mark.parametrize("activation", [*SIGMAS, "rational"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_beta_zero_it_is_lora_bit_for_bit(activation, dtype):
    adapter = layer(activation=activation).to(dtype)
    lora = nn.Sequential(nn.Linear(12, 8, dtype=dtype))
    la.attach(lora, la.LoRA(rank=4, alpha=8.0, targets=["0"]))
    lora[0].load_state_dict({k: v for k, v in adapter.state_dict().items() if k in lora[0].state_dict()})
    x = torch.randn(50, 12, dtype=dtype)
    assert not torch.equal(adapter(x), lora(x))
    adapter.set_progress(1.0)
    assert torch.equal(adapter(x), lora(x))
    actual = torch.autograd.grad(adapter(x).float().square().sum(), [adapter.lora_A, adapter.lora_B])
    expected = torch.autograd.grad(lora(x).float().square().sum(), [lora[0].lora_A, lora[0].lora_B])
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_a_learnable_activation_starts_at_silu_and_learns_by_group():
    adapter = layer(activation="rational", groups=2)
    z = torch.linspace(-5, 5, 101)[:, None].expand(-1, 4)
    assert (adapter.sigma(z) - SIGMAS["silu"](z)).abs().max() < 3e-4
    with torch.no_grad():
        adapter.sigma_numerator[1, 2] = 1.0
    y = adapter.sigma(z)
    assert torch.equal(y[:, 0], y[:, 1])
    assert not torch.allclose(y[:, 1], y[:, 2])
    x = torch.randn(50, 12)
    adapter(x).square().sum().backward()
    assert adapter.sigma_numerator.grad.abs().sum(1).min() > 0
    assert adapter.sigma_denominator.grad.abs().sum(1).min() > 0


def test_a_step_along_any_coefficient_moves_the_function_alike():
    adapter = layer(activation="rational")
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))[:, None].expand(-1, 4)
    start, step, moved = adapter.sigma(z), 1e-3, []
    for parameter in (adapter.sigma_numerator, adapter.sigma_denominator):
        for i in range(parameter.shape[1]):
            with torch.no_grad():
                parameter[0, i] += step
                moved.append((adapter.sigma(z) - start).square().mean().sqrt().item() / step)
                parameter[0, i] -= step
    assert moved == pytest.approx([0.3] * 10, rel=0.1)


def test_coefficients_do_not_decay():
    adapter = layer(activation="rational")
    assert {id(p) for p in adapter.undecayed_parameters()} == {
        id(adapter.sigma_numerator),
        id(adapter.sigma_denominator),
    }
    assert layer().undecayed_parameters() == []


def test_a_convolution():
    base = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    adapter = layer(base, activation="relu")
    x = torch.randn(2, 4, 9, 9)
    code = torch.relu(torch.nn.functional.conv2d(x, adapter.lora_A.view(4, 4, 3, 3), None, 2, 1))
    expected = base(x) + 2 * torch.nn.functional.conv2d(code, adapter.lora_B.view(8, 4, 1, 1))
    torch.testing.assert_close(adapter(x), expected)
    learned = layer(nn.Conv1d(4, 8, 3), activation="rational", groups=2)
    assert learned(torch.randn(2, 4, 9)).shape == (2, 8, 7)
    adapter.set_progress(1.0)
    before = adapter(x)
    network = nn.Sequential(base)
    adapter.merge()
    torch.testing.assert_close(adapter(x), before)
    assert len(network) == 1


def test_set_progress_follows_each_schedule():
    network = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    slow, quick = Linear(end=1.0), Linear(end=0.5)
    la.attach(
        network, [la.AFALoRA(rank=2, schedule=slow, targets=["0"]), la.AFALoRA(rank=2, schedule=quick, targets=["1"])]
    )
    assert [a.beta.item() for _, a in la.adapters(network)] == [1.0, 1.0]
    la.set_progress(network, 0.25)
    assert [a.beta.item() for _, a in la.adapters(network)] == [0.75, 0.5]
    la.set_progress(network, 1.0)
    assert [a.beta.item() for _, a in la.adapters(network)] == [0.0, 0.0]
    for progress in (-0.1, 1.1):
        with pytest.raises(la.AdapterError, match=r"progress .* must lie in \[0, 1\]"):
            la.set_progress(network, progress)
    with pytest.raises(la.AdapterError, match="has no adapters"):
        la.set_progress(nn.Linear(2, 2), 0.5)


def steps(adapter: AFAAdapter, count: int, passes: int = 1) -> None:
    optimizer = torch.optim.SGD([adapter.lora_A, adapter.lora_B], 1e-4)
    for _ in range(count):
        for _ in range(passes):
            adapter(torch.randn(2, 12)).square().sum().backward()
        optimizer.step()


def test_training_without_annealing_is_noticed():
    adapter = layer()
    with pytest.raises(
        la.AdapterError, match=r"'0' has trained for 100 steps and nothing moves its beta: train with Adapt"
    ):
        steps(adapter, 110)
    steps(adapter.eval(), 2)
    adapter.train().set_progress(0.0)
    steps(adapter, 5)


def test_other_trainings_are_left_alone():
    steps(layer(schedule=Hold(1.0)), 110)
    steps(layer(), 3, passes=60)
    done = layer()
    done.load_state_dict(done.state_dict() | {"beta": torch.tensor(0.0)})
    steps(done, 110)


def test_beta_is_saved_and_loaded(tmp_path):
    network = nn.Sequential(nn.Linear(12, 12))
    la.attach(network, la.AFALoRA(rank=2, schedule=Linear(end=1.0)))
    la.set_progress(network, 0.25)
    la.save_adapters(network, tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 12))
    fresh.load_state_dict({"0.weight": network[0].base.weight, "0.bias": network[0].base.bias})
    la.load_adapters(fresh, tmp_path)
    assert fresh[0].beta.item() == 0.75
    assert fresh[0].schedule == Linear(end=1.0)


def test_merging_is_refused_before_the_end_with_the_reason():
    network = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    la.attach(network, [la.LoRA(rank=2, targets=["0"]), la.AFALoRA(rank=2, schedule=Linear(end=0.5), targets=["1"])])
    la.set_progress(network, 0.4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    message = r"'1' is nonlinear at beta = 0.2, and no weight is equal to it; train until Linear\(.*\) reaches 0"
    for unload in (True, False):
        with pytest.raises(la.AdapterError, match=message):
            la.merge(network, unload=unload)
    with pytest.raises(la.AdapterError, match="nonlinear at beta"):
        network[1].delta_weight()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    la.set_progress(network, 0.5)
    la.merge(network, unload=False)
    with pytest.raises(la.AdapterError, match=r"'1' is merged at its linear end; call lit_adapters.unmerge"):
        la.set_progress(network, 0.0)
    la.unmerge(network)
    la.merge(network)
    assert [type(m) for m in network] == [nn.Linear, nn.Linear]


def test_statistics():
    statistics = layer(schedule=Hold(0.25)).statistics()
    assert statistics["beta"] == 0.25
    assert statistics["relative_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "swish"}, "activation 'swish' must be one of 'relu', 'silu'"),
        ({"groups": 2}, "groups 2 must be exactly 1 unless"),
        ({"activation": "rational", "groups": 0}, "groups 0"),
        ({"schedule": 0.3}, "0.3 is no schedule"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.AFALoRA(**settings)


def test_groups_must_divide_the_rank():
    with pytest.raises(la.AdapterError, match="3 groups do not divide the rank 4"):
        layer(activation="rational", groups=3)
