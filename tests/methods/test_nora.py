"""NoRA: values and gradients against a float64 implementation of the equations, counts, groups, anchoring."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lit_adapters as la
from lit_adapters.methods.description import relative_drift
from lit_adapters.methods.nora import NoRAActivation

FORMS = ("abs-of-sum", "sum-of-abs")


def mlp(activation: nn.Module | None = None, width: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), activation or nn.GELU(), nn.Linear(width, 2))


def adapted_activation(moved: float = 0.1, activation: nn.Module | None = None, **settings) -> NoRAActivation:
    network = mlp(activation)
    la.attach(network, la.NoRA(**{"groups": 4} | settings))
    ((_, adapter),) = la.adapters(network)
    with torch.no_grad():
        for parameter in adapter.adapter_parameters().values():
            parameter.add_(moved * torch.randn_like(parameter))
    return adapter


def oracle(adapter: NoRAActivation, x: torch.Tensor, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The equations of the module's docstring, element by element of the coefficients, in float64."""
    config, groups = adapter.config, adapter.groups
    updates = {}
    for part in ("numerator", "denominator"):
        if config.rank is None:
            update = factors[f"{part}_delta"]
        else:
            update = config.alpha / config.rank * factors[f"{part}_B"] @ factors[f"{part}_A"]
        updates[part] = update * getattr(adapter, f"{part}_scale").double()
    a0, b0 = adapter.base_numerator.double(), adapter.base_denominator.double()

    def r(x, a, b):
        p = sum(a[i] * x**i for i in range(len(a)))
        if config.denominator == "abs-of-sum":
            return p / (1 + (sum(b[j] * x ** (j + 1) for j in range(len(b)))).abs())
        return p / (1 + sum(b[j].abs() * x.abs() ** (j + 1) for j in range(len(b))))

    columns = x.shape[adapter.channel_dim] // groups
    pieces = []
    for g, piece in enumerate(x.split(columns, adapter.channel_dim)):
        y = r(piece, a0 + updates["numerator"][g], b0 + updates["denominator"][g])
        if config.base == "anchored":
            y = F.gelu(piece) + y - r(piece, a0, b0)
        pieces.append(y)
    return torch.cat(pieces, adapter.channel_dim)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["rational", "anchored"])
@pytest.mark.parametrize("scaling", ["density", "none"])
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 5, 24), -1), ((3, 24, 4), 1)])
def test_value_and_gradient_against_float64(form, base, scaling, rank, shape, channel_dim):
    moved = 0.1 if scaling == "density" else 0.01
    adapter = adapted_activation(
        moved, denominator=form, base=base, scaling=scaling, rank=rank, channel_dim=channel_dim
    )
    x = (2 * torch.randn(shape)).requires_grad_()
    grad = torch.randn(shape)
    parameters = adapter.adapter_parameters()
    y = adapter(x)
    actual = torch.autograd.grad(y, [x, *parameters.values()], grad)

    exact_x = x.detach().double().requires_grad_()
    factors = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}
    exact_y = oracle(adapter, exact_x, factors)
    exact = torch.autograd.grad(exact_y, [exact_x, *factors.values()], grad.double())

    assert (y - exact_y).abs().max() <= 1e-6 * exact_y.abs().max()
    for name, got, expected in zip(["x", *parameters], actual, exact, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_coefficients_are_effective_and_differentiable():
    adapter = adapted_activation(base="rational")
    a, b = adapter.coefficients()
    assert (a.shape, b.shape) == ((4, 6), (4, 4))
    x = torch.linspace(-3, 3, 24)
    p = sum(a[:, i].repeat_interleave(6) * x**i for i in range(6))
    q = 1 + sum(b[:, j].repeat_interleave(6) * x ** (j + 1) for j in range(4)).abs()
    torch.testing.assert_close(adapter(x), p / q)
    for gradient in torch.autograd.grad(a.sum() + b.sum(), list(adapter.adapter_parameters().values())):
        assert gradient.any()


def test_in_use_coefficients_are_formed_once_until_something_changes(monkeypatch):
    adapter, x = adapted_activation(base="rational"), torch.randn(3, 24)
    formed, original = [], NoRAActivation.coefficients
    monkeypatch.setattr(NoRAActivation, "coefficients", lambda self: (formed.append(1), original(self))[1])
    events = {
        "nothing": (lambda: None, 0),
        "write": (lambda: adapter.numerator_B.add_(1), 1),
        "load": (lambda: adapter.load_state_dict(adapter.state_dict()), 1),
        "modes": (lambda: adapter.train().eval(), 1),
        "cast": (lambda: adapter.double().float(), 1),
    }
    adapter.eval()
    with torch.no_grad():
        adapter(x)
        for event, (happen, times) in events.items():
            happen()
            formed.clear()
            y = adapter(x), adapter(x)
            assert len(formed) == times, event
            assert torch.equal(y[0], y[1])
            assert torch.equal(y[0], la.ops.rational(x, *original(adapter), adapter.config.denominator))
    formed.clear()
    adapter(x), adapter.train()(x)
    assert len(formed) == 2  # a gradient may be wanted


def test_a_group_changes_its_own_channels_only():
    adapter = adapted_activation(0.0, rank=None)
    x = torch.randn(10, 24)
    before = adapter(x)
    with torch.no_grad():
        adapter.numerator_delta[1, 2] = 1.0
    changed = (adapter(x) != before).any(0)
    assert changed.tolist() == [6 <= channel < 12 for channel in range(24)]


def test_adams_first_step_moves_the_output_as_far_with_any_number_of_groups():
    width, moved = 1536, []
    for groups in (8, 64, width):
        torch.manual_seed(0)
        network = mlp(width=width)
        la.attach(network, la.NoRA(groups=groups, rank=None))
        ((_, adapter),) = la.adapters(network)
        x = 2 * torch.randn(256, width)
        optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
        before = adapter(x).detach()
        (adapter(x) - torch.randn(256, width)).square().mean().backward()
        optimizer.step()
        moved.append(float((adapter(x).detach() - before).square().mean().sqrt()))
    assert max(moved) < 1.15 * min(moved)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"groups": 8, "rank": 3}, 78),
        ({"groups": 8, "rank": None}, 80),
        ({"groups": 4, "rank": 2}, 2 * (2 * 4 + 10)),
        ({"groups": 8, "rank": 3, "degrees": (3, 2)}, 3 * (2 * 8 + 6)),
    ],
)
def test_parameter_counts(settings, count):
    report = la.attach(mlp(), la.NoRA(**settings))
    assert [n for _, _, n in report.adapters] == [count]


def test_the_papers_count_on_vit_tiny():
    """0.02M parameters, 0.4%: twelve activations and the head of CIFAR-100."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=100)
    report = la.attach(model, la.NoRA(groups=8, rank=3), train=["head"])
    assert report.adapter_parameters == report.trainable_without_head == 12 * 78 == 936
    assert report.trainable == 20_236
    assert 100 * report.trainable / report.total == pytest.approx(0.37, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fit_keeps_its_precision_while_a_model_is_built_in_half(dtype):
    """As Lightning builds it for bf16-true: half is the dtype of new tensors then."""

    def built():
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
        la.attach(model, la.NoRA(groups=2, fit_range=(-7.3, 7.3)))
        return dict(model[1].named_buffers(recurse=False))

    expected = built()
    torch.set_default_dtype(dtype)
    try:
        found = built()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("base_numerator", "base_denominator", "fit_range", "numerator_scale", "denominator_scale"):
        assert torch.equal(found[name], expected[name]), name


def test_initialisation():
    adapter = adapted_activation(0.0, groups=8, rank=3)
    for name, parameter in adapter.adapter_parameters().items():
        if name.endswith("_B"):
            assert not parameter.any()
        else:
            bound = 1 / math.sqrt(parameter.shape[1])  # Kaiming-uniform with a = sqrt 5
            assert 0.5 * bound < parameter.abs().max() <= bound
    assert not any(p.any() for p in adapted_activation(0.0, rank=None).adapter_parameters().values())


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Mish(), nn.Softplus(), nn.ELU()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_anchored_starts_as_the_activation_itself_far_outside_its_interval(activation, dtype):
    adapter = adapted_activation(0.0, activation=activation, base="anchored")
    x = torch.cat([torch.linspace(-50, 50, 24 * 40), torch.tensor([0.0, -0.0, 1e4, -1e4] * 6)]).to(dtype).view(-1, 24)
    assert torch.equal(adapter(x), activation(x))
    assert adapter(x).dtype == dtype


def test_inplace_activation_spares_its_input_and_is_inplace_again_after_detach():
    activation = nn.ReLU(inplace=True)
    network = mlp(activation)
    x = torch.randn(5, 6)
    expected = network(x)
    la.attach(network, la.NoRA(groups=4, base="anchored"))
    assert activation.inplace
    network(x).sum().backward()
    with la.disabled(network):
        assert torch.equal(network(x), expected)
    la.detach(network)
    assert network[1] is activation
    assert activation.inplace


@pytest.mark.parametrize("base", ["rational", "anchored"])
def test_merged_activation_is_the_same_function_with_plain_coefficients(base):
    network = mlp(nn.SiLU(inplace=True))
    la.attach(network, la.NoRA(groups=4, base=base))
    with torch.no_grad():
        for parameter in network[1].adapter_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(7, 6)
    expected, (a, b) = network(x), network[1].coefficients()
    la.merge(network)
    folded = network[1]
    assert isinstance(folded, la.RationalActivation)
    assert torch.equal(folded.numerator, a)
    assert torch.equal(folded.denominator, b)
    assert torch.equal(network(x), expected)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    assert not any(p.requires_grad for p in folded.parameters())
    folded.requires_grad_(True)
    network(x).sum().backward()
    assert folded.numerator.grad.any()
    assert folded.denominator.grad.any()


def test_functions_and_statistics_follow_the_coefficients():
    adapter = adapted_activation(0.0, rank=None, base="anchored")
    grid, initial, current = adapter.functions()
    assert torch.equal(initial, F.gelu(grid))
    assert torch.equal(current, initial.expand(4, -1))
    start = adapter.statistics()
    assert {start[key] for key in ("drift", "relative_drift", "sup_drift")} == {0.0}
    assert start["relative_max_slope"] == 1.0
    assert start["max_slope"] == pytest.approx(1.1289, abs=1e-3)  # of GELU, at sqrt 2
    assert not adapter.learned_change(grid).any()
    with torch.no_grad():
        adapter.numerator_delta[2, 0] = 1.0  # adds sigma / Q, largest at 0 where Q = 1
    _, _, current = adapter.functions()
    shift = adapter.numerator_scale[0].item()
    assert (current[2] - initial).abs().max() == pytest.approx(shift, rel=1e-2)
    assert torch.equal(current[[0, 1, 3]], initial.expand(3, -1))
    statistics = adapter.statistics()
    assert statistics["sup_drift"] == pytest.approx(shift, rel=1e-2)
    assert 0 < statistics["drift"] < shift
    torch.testing.assert_close(adapter.learned_change(grid), current - initial)
    assert relative_drift(adapter).tolist() == pytest.approx([0, 0, statistics["relative_drift"], 0])


def test_singular_values_are_in_units_of_the_effect_on_the_function():
    """Whatever the scaling, one unit of every direction: what the factors multiply to, with alpha / rank."""
    adapter = adapted_activation(0.3)
    factor = adapter.config.alpha / adapter.config.rank
    expected = torch.linalg.svdvals(factor * (adapter.numerator_B @ adapter.numerator_A).detach().double())
    torch.testing.assert_close(adapter.singular_values()["numerator"], expected, rtol=1e-5, atol=1e-7)


def test_what_an_observation_counts():
    adapter = adapted_activation(0.0, fit_range=(-1.0, 2.0))
    x = torch.tensor([-20.0, -1.5, -0.5, 0.0, 1.0, 2.5, 0.25, 30.0]).view(2, 4)
    assert adapter.observe(x) == {"outside_range": 0.5}
    counts = adapter.input_histogram(x)
    assert (counts[0], counts[-1], counts.sum()) == (1, 1, 8)
