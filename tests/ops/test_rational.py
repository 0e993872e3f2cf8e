"""The rational function: fast path against the readable reference, in float64, over forms, shapes, dtypes and traps."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_adapters.ops import _rational_blocks, rational, rational_reference, set_rational_backend

FORMS = ["abs-of-sum", "sum-of-abs"]
SHAPES = [
    ((2, 7, 48), 8, -1),
    ((5, 16), 1, 1),
    ((3, 24, 5, 4), 4, 1),
    ((2, 5, 4, 24), 24, -1),
    ((64,), 8, 0),
    ((1, 1, 8), 8, 2),
]
GELU_6 = (
    [-3.7316460e-3, 0.5, 0.42029126, 0.12614483, 0.015942420, 7.0832076e-4],
    [0.0, 0.25230130, 0.0, 0.0014168610],
)


@pytest.fixture(autouse=True, params=["auto", "blocks"])
def backend(request):
    """The C++ kernel, and the path without a compiler."""
    torch.manual_seed(0)
    set_rational_backend(request.param)
    yield request.param
    set_rational_backend("auto")


def coefficients(groups, degrees=(5, 4), dtype=torch.float32, seed=0):
    """GELU's coefficients, different in every group, all of them non-zero."""
    generator = torch.Generator().manual_seed(seed)
    if degrees == (5, 4):
        a, b = (torch.tensor(c, dtype=torch.float64).repeat(groups, 1) for c in GELU_6)
    else:
        a = torch.randn(groups, degrees[0] + 1, generator=generator, dtype=torch.float64) * 0.3
        b = torch.rand(groups, degrees[1], generator=generator, dtype=torch.float64) * 0.2 + 0.05
    a, b = (c * (1 + 0.1 * torch.randn(c.shape, generator=generator, dtype=torch.float64)) for c in (a, b))
    b = b + 1e-3 * torch.randn(b.shape, generator=generator, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def run(function, x, a, b, grad, **kwargs):
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = function(x, a, b, **kwargs)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, a.grad, b.grad


def yardstick(x, a, b, grad, **kwargs):
    return run(rational_reference, x.double(), a.double(), b.double(), grad.double(), **kwargs)


def normwise(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def absolute_terms(x, a, b, grad, form):
    """Sum over the input of |grad| |dR/dcoefficient|: the scale against which a long sum's rounding is judged."""
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    flat = x.double().unflatten(-1, (a.shape[0], -1)).transpose(-1, -2).reshape(-1, a.shape[0])
    weight = grad.double().unflatten(-1, (a.shape[0], -1)).transpose(-1, -2).reshape(-1, a.shape[0])
    total_a, total_b = torch.zeros_like(a), torch.zeros_like(b)
    for row, w in zip(flat, weight, strict=True):
        ga, gb = torch.autograd.grad((rational_reference(row, a, b, form) * w).sum(), (a, b))
        total_a += ga.abs()
        total_b += gb.abs()
    return total_a, total_b


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "groups", "channel_dim"), SHAPES)
def test_float32_agrees_with_float64_reference(form, shape, groups, channel_dim):
    x, grad = torch.randn(shape) * 4, torch.randn(shape)
    a, b = coefficients(groups)
    y, dx, da, db = run(rational, x, a, b, grad, form=form, channel_dim=channel_dim)
    ry, rdx, rda, rdb = yardstick(x, a, b, grad, form=form, channel_dim=channel_dim)
    assert normwise(y, ry) <= 1e-6
    assert normwise(dx, rdx) <= 1e-6
    moved_x, moved_grad = x.movedim(channel_dim, -1), grad.movedim(channel_dim, -1)
    total_a, total_b = absolute_terms(moved_x, a, b, moved_grad, form)
    assert ((da - rda).abs() <= 5e-6 * total_a).all()
    assert ((db - rdb).abs() <= 5e-6 * total_b).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degrees", [(5, 4), (3, 2), (6, 5), (2, 3), (1, 1), (7, 7)])
def test_degrees_in_float64(form, degrees):
    x, grad = torch.randn(3, 5, 16, dtype=torch.float64) * 2, torch.randn(3, 5, 16, dtype=torch.float64)
    a, b = coefficients(4, degrees, torch.float64)
    for actual, expected in zip(
        run(rational, x, a, b, grad, form=form), yardstick(x, a, b, grad, form=form), strict=True
    ):
        assert normwise(actual, expected) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    a, b = coefficients(2, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    base = coefficients(2, dtype=torch.float64, seed=1)
    for reference_point in (None, base):
        assert torch.autograd.gradcheck(
            lambda x, a, b, at=reference_point: rational(x, a, b, form, base=at),
            (x, a.requires_grad_(), b.requires_grad_()),
        )


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_computed_in_float32(form):
    """The result is the float64 value rounded once: half a unit in the last place, plus float32's own error."""
    x, grad = (torch.randn(4, 9, 48) * 4).bfloat16(), torch.randn(4, 9, 48).bfloat16()
    a, b = coefficients(8)
    y, dx, da, db = run(rational, x, a, b, grad, form=form)
    ry, rdx, rda, rdb = yardstick(x, a, b, grad, form=form)
    assert y.dtype == dx.dtype == torch.bfloat16
    assert da.dtype == db.dtype == torch.float32
    for actual, expected in ((y, ry), (dx, rdx)):
        assert ((actual.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * expected.abs().max()).all()
    assert normwise(da, rda) < 1e-5
    assert normwise(db, rdb) < 1e-5


def test_float16_does_not_overflow():
    x = torch.tensor([[-60000.0, -9.5, 9.5, 60000.0]]).half()
    a, b = coefficients(1)
    assert torch.isfinite(run(rational, x, a, b, torch.ones_like(x))[1]).all()
    y = rational(torch.tensor([[-40.0, -9.5, 9.5, 40.0]]).half(), a, b)
    assert (
        normwise(y, rational_reference(torch.tensor([[-40.0, -9.5, 9.5, 40.0]]).double(), a.double(), b.double()))
        < 1e-3
    )


@pytest.mark.parametrize("form", FORMS)
def test_huge_inputs_stay_finite_and_right(form):
    x = torch.tensor([[-1e8, -3e4, -1e4, -1.0, 0.0, 1.0, 1e4, 3e4, 1e8, 1e30]])
    a, b = coefficients(1)
    actual = run(rational, x, a, b, torch.ones_like(x), form=form)
    expected = yardstick(x, a, b, torch.ones_like(x), form=form)
    for got, want in zip(actual, expected, strict=True):
        assert torch.isfinite(got).all()
        assert ((got.double() - want).abs() <= 1e-5 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_spoils_nothing_but_itself(form):
    a, b = coefficients(1)
    y = rational(torch.tensor([[float("nan"), 1e30, -1e30, 2.0]]), a, b, form)
    assert y.isnan().tolist() == [[True, False, False, False]]
    assert torch.equal(y[:, 1:], rational(torch.tensor([[1e30, -1e30, 2.0]]), a, b, form))


@pytest.mark.parametrize("form", FORMS)
def test_zero_input_and_zero_denominator_train(form):
    """sign(0) = +1: the denominator of a plain polynomial receives the one-sided gradient instead of none."""
    x = torch.tensor([[0.0, 0.0, 0.5, -0.5, 2.0, -2.0]])
    a = torch.tensor([[0.1, 1.0, 0.3, 0.0, 0.2, 0.1]])
    b = torch.zeros(1, 4)
    grad = torch.arange(1.0, 7.0).unsqueeze(0)
    actual, expected = run(rational, x, a, b, grad, form=form), yardstick(x, a, b, grad, form=form)
    for got, want in zip(actual, expected, strict=True):
        assert normwise(got, want) <= 1e-6
    assert (actual[3] != 0).all()
    # By hand, at b = 0: dR/db_1 = -x P (abs-of-sum) or -|x| P (sum-of-abs), times grad.
    p = sum(a[0, i].double() * x.double() ** i for i in range(6))
    power = x.double() if form == "abs-of-sum" else x.double().abs()
    assert actual[3][0, 0].item() == pytest.approx(-(grad.double() * power * p).sum().item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_difference_form(form):
    x, grad = torch.randn(4, 33, 16) * 4, torch.randn(4, 33, 16)
    base = coefficients(4, seed=3)
    a, b = (c + 1e-3 for c in base)
    y, dx, da, db = run(rational, x, a, b, grad, form=form, base=base)
    double = [t.double() for t in (x, a, b, grad, *base)]
    ry, rdx, rda, rdb = run(
        lambda x, a, b: rational_reference(x, a, b, form) - rational_reference(x, *double[4:], form), *double[:4]
    )
    # A difference of two float32 functions is exact to their own rounding, not to its own size.
    scale = rational_reference(double[0], *double[4:], form).abs().max()
    assert (y - ry).abs().max() <= 1e-6 * scale
    slopes = max(
        run(rational_reference, *t, double[3], form=form)[1].abs().max() for t in (double[:3], [double[0], *double[4:]])
    )
    assert (dx - rdx).abs().max() <= 2e-6 * slopes
    assert normwise(da, rda) < 1e-5
    assert normwise(db, rdb) < 1e-5
    same = rational(x, *base, form, base=base)
    assert torch.equal(same, torch.zeros_like(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "expanded", "sliced"])
def test_memory_layouts(layout):
    x = {
        "contiguous": torch.randn(2, 8, 3, 5),
        "channels_last": torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last),
        "permuted": torch.randn(5, 3, 8, 2).permute(3, 2, 1, 0),
        "expanded": torch.randn(2, 8, 1, 1).expand(2, 8, 3, 5),
        "sliced": torch.randn(2, 16, 3, 5)[:, ::2],
    }[layout]
    a, b = coefficients(4)
    grad = torch.randn(2, 8, 3, 5)
    actual = run(rational, x, a, b, grad, channel_dim=1)
    for got, want in zip(actual, yardstick(x, a, b, grad, channel_dim=1), strict=True):
        assert normwise(got, want) < 1e-5
    if layout == "channels_last":
        assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_saves_the_input_alone():
    saved = []
    x = torch.randn(8, 64, 48, requires_grad=True)
    a, b = (c.requires_grad_() for c in coefficients(8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rational(x, a, b)
    large = [t for t in saved if t.numel() > 1000]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


def test_several_blocks_equal_one(monkeypatch):
    x, grad = torch.randn(40, 48), torch.randn(40, 48)
    a, b = coefficients(8)
    whole = run(rational, x, a, b, grad)
    monkeypatch.setattr(_rational_blocks, "_BLOCK_OF_THREAD", 100)
    pieces = run(rational, x, a, b, grad)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    for got, want in zip(pieces[2:], whole[2:], strict=True):
        assert normwise(got, want.double()) < 1e-6


def test_partial_gradients_and_empty_input():
    a, b = coefficients(4)
    x = torch.randn(3, 8, requires_grad=True)
    rational(x, a, b).sum().backward()
    assert x.grad is not None
    a.requires_grad_()
    rational(x.detach(), a, b).sum().backward()
    assert a.grad is not None
    empty = torch.randn(0, 8, requires_grad=True)
    rational(empty, a, b).sum().backward()
    assert empty.grad.shape == (0, 8)


def test_operator_registration():
    a, b = coefficients(4)
    arguments = (torch.randn(3, 8, requires_grad=True), a.requires_grad_(), b.requires_grad_())
    for form in FORMS:
        torch.library.opcheck(torch.ops.lit_adapters.rational.default, (*arguments, form, -1, None, None))


def test_compiles_to_one_graph():
    a, b = (c.requires_grad_() for c in coefficients(4))
    compiled = torch.compile(lambda x: rational(torch.sin(x), a, b) * 2, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8, requires_grad=True)
    compiled(x).sum().backward()
    assert torch.allclose(compiled(x), rational(torch.sin(x), a, b) * 2)
    assert a.grad.abs().sum() > 0


def test_without_gradients_the_operator_is_left_out_where_nobody_needs_it():
    """The same bits; interceptors still see the operator."""
    x, (a, b) = torch.randn(3, 12), coefficients(2)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    expected = rational(x, a, b)
    with torch.no_grad():
        assert torch.equal(rational(x, a, b), expected)
        with Watch():
            watched = rational(x, a, b)
        assert seen == ["lit_adapters.rational.default"]
        assert torch.equal(watched, expected)
        with FakeTensorMode() as mode:
            assert rational(mode.from_tensor(x), mode.from_tensor(a), mode.from_tensor(b)).shape == x.shape
        assert rational(x.to("meta"), a.to("meta"), b.to("meta")).is_meta
    with torch.inference_mode():
        assert torch.equal(rational(x, a, b), expected)


def test_bad_shapes_are_named():
    a, b = coefficients(8)
    with pytest.raises(ValueError, match=r"8 groups do not divide the 12 channels"):
        rational(torch.randn(2, 12), a, b)
    with pytest.raises(ValueError, match="must agree"):
        rational(torch.randn(2, 8), a, b[:4])
    with pytest.raises(ValueError, match="base has shapes"):
        rational(torch.randn(2, 8), a, b, base=(a[:4], b[:4]))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cuda'"):
        set_rational_backend("cuda")
