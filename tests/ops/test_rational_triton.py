"""The Triton kernels against the reference in float64; without a GPU, under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from lit_adapters.ops import rational, set_rational_backend
from tests.ops.test_rational import FORMS, SHAPES, absolute_terms, coefficients, normwise, run, yardstick
from tests.tiers import fast_only

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = [SHAPES[3], ((37, 3, 11), 11, -1), ((3, 2, 1100), 1, -1)]  # one to ten seconds under the interpreter
ALL_SHAPES = [*SHAPES, *LONG[1:], ((0, 8), 2, -1)]


@pytest.fixture(autouse=True)
def triton_backend():
    set_rational_backend("triton")
    yield
    set_rational_backend("auto")


def inputs(shape, groups, degrees=(5, 4), scale=4.0):
    a, b = coefficients(groups, degrees)
    return (scale * torch.randn(shape)).to(DEVICE), a.to(DEVICE), b.to(DEVICE), torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "groups", "channel_dim"), fast_only([s for s in ALL_SHAPES if s not in LONG], ALL_SHAPES)
)
def test_agrees_with_float64(form, shape, groups, channel_dim):
    x, a, b, grad = inputs(shape, groups)
    got = run(rational, x, a, b, grad, form=form, channel_dim=channel_dim)
    if not x.numel():
        assert not got[2].any()
        assert not got[3].any()
        return
    expected = yardstick(x, a, b, grad, form=form, channel_dim=channel_dim)
    assert normwise(got[0], expected[0]) <= 1e-6
    assert normwise(got[1], expected[1]) <= 1e-6
    moved = [t.movedim(channel_dim, -1) for t in (x, grad)]
    terms = absolute_terms(moved[0], a, b, moved[1], form)
    for gradient, reference, term in zip(got[2:], expected[2:], terms, strict=True):
        assert ((gradient.double() - reference).abs() / term.clamp_min(1e-30)).max() <= 5e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degrees", [(3, 2), (0, 1), (7, 6), (5, 1)])
def test_other_degrees(form, degrees):
    tensors = inputs((6, 5, 12), 3, degrees, scale=1.0)
    for got, expected in zip(run(rational, *tensors, form=form), yardstick(*tensors, form=form), strict=True):
        assert normwise(got, expected) <= 5e-6


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_bfloat16_and_is_as_exact_as_its_storage(form):
    x, a, b, grad = inputs((4, 9, 32), 4)
    got = run(rational, x.bfloat16(), a, b, grad.bfloat16(), form=form)
    expected = yardstick(x.bfloat16(), a, b, grad.bfloat16(), form=form)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    unit = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts off where a GPU rounds
    assert normwise(got[0], expected[0]) <= unit
    assert normwise(got[1], expected[1]) <= unit
    assert normwise(got[2], expected[2]) <= 5e-6


@pytest.mark.parametrize("form", FORMS)
def test_float64_large_and_nan_inputs(form):
    x, a, b, grad = inputs((3, 16), 2)
    for got, expected in zip(
        run(rational, x.double(), a.double(), b.double(), grad.double(), form=form),
        yardstick(x, a, b, grad, form=form),
        strict=True,
    ):
        assert normwise(got, expected) <= 1e-14
    x[0, 0], x[1, 9], x[2, 3] = 3e8, -1e30, 0.0
    got, expected = (
        f(rational, x, a, b, grad, form=form) for f in (run, lambda _, *args, **kw: yardstick(*args, **kw))
    )
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    x[0, 1] = float("nan")
    y = rational(x, a, b, form=form)
    assert y.isnan().sum() == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_difference_from_a_base_is_exactly_zero_at_the_start_and_right_after(form):
    x, a, b, grad = inputs((5, 4, 24), 8)
    assert not rational(x, a, b, form=form, base=(a, b)).any()
    moved = a + 0.1 * torch.randn_like(a)
    got = run(rational, x, moved, b, grad, form=form, base=(a, b))
    with_base, without = (yardstick(x, c, b, grad, form=form) for c in (moved, a))
    assert normwise(got[0], with_base[0] - without[0]) <= 5e-6
    assert normwise(got[1], with_base[1] - without[1]) <= 5e-6
    assert normwise(got[2], with_base[2]) <= 5e-6


def test_coefficients_without_gradient_and_repeated_runs():
    x, a, b, grad = inputs((50, 3, 40), 5)
    first, second = (run(rational, x, a, b, grad) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(first, second, strict=True))
    leaf = x.clone().requires_grad_()
    rational(leaf, a, b).backward(grad)
    assert torch.equal(leaf.grad, first[1])


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lit_adapters.ops import _rational_triton as kernels

for memory in ("fp32", "bf16", "fp16", "fp64"):
    for kernel, tensors, more in (
        (kernels._forward_kernel, ("x_pointer", "y_pointer"), {}),
        (kernels._backward_kernel, ("g_pointer", "x_pointer", "d_pointer"), {"COEFFICIENTS": True}),
    ):
        constants = {"M": 5, "N": 4, "ABS_OF_SUM": True, "BASE": True, "WIDE": memory == "fp64", "ROWS": 8}
        constants |= more | {"COLUMNS": 128}
        kinds = {"sums": "*fp64", "outer": "i32", "G": "i32", "K": "i32"} | {t: f"*{memory}" for t in tensors}
        kinds |= {c: "*fp32" for c in ("a", "b", "a0", "b0")} | {c: "constexpr" for c in constants}
        source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, constants)
        assembly = compile(source, target=GPUTarget("cuda", 90, 32)).asm
        assert assembly["cubin"] and "atom" not in assembly["ptx"], (memory, kernel)
        print("compiled")
"""


@pytest.mark.slow
def test_compiles_to_machine_code_for_a_gpu_without_atomics():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 8


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="triton"):
        set_rational_backend("cuda")
