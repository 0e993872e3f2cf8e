"""The C++ kernel: how it is built and kept, the edges of its vectors and chunks, threads, no compiler."""

import subprocess
import sys

import pytest
import torch

from lit_adapters.ops import _rational_native as native
from lit_adapters.ops import rational, rational_reference
from tests.ops.test_rational import FORMS, coefficients, normwise, run, yardstick


def calls(monkeypatch):
    """Names of the kernels that ran."""
    ran, original = [], native._library
    monkeypatch.setattr(native, "_library", lambda *a: (ran.append(1), original(*a))[1])
    return ran


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [8, 11, 16, 24, 37])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_rows_of_any_length_in_one_or_several_chunks(length, rows, form, monkeypatch):
    monkeypatch.setattr(native, "_CHUNK", 1 << 10)
    ran = calls(monkeypatch)
    a, b = coefficients(3)
    x, grad = torch.randn(rows, 3 * length) * 4, torch.randn(rows, 3 * length)
    got, expected = run(rational, x, a, b, grad, form=form), yardstick(x, a, b, grad, form=form)
    assert len(ran) == 2
    for value, reference, tolerance in zip(got, expected, (1e-6, 1e-6, 5e-6, 5e-6), strict=True):
        assert normwise(value, reference) <= tolerance


def test_the_result_does_not_depend_on_the_number_of_threads():
    a, b = coefficients(8)
    x, grad = torch.randn(700, 192), torch.randn(700, 192)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(rational, x, a, b, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(s, t) for other in results[1:] for s, t in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_once(form):
    a, b = coefficients(4)
    x, grad = (torch.randn(50, 48) * 4).bfloat16(), torch.randn(50, 48).bfloat16()
    got = run(rational, x, a, b, grad, form=form)
    y, dx, *sums = yardstick(x, a, b, grad, form=form)
    assert (got[0].double() - y).abs().le(2**-8 * y.abs() + 1e-6).all()
    assert (got[1].double() - dx).abs().le(2**-8 * dx.abs() + 1e-6).all()
    for value, reference in zip(got[2:], sums, strict=True):
        assert normwise(value, reference) <= 5e-6


def test_a_number_too_large_for_float32_powers_and_a_missing_one_beside_others():
    a, b = coefficients(2)
    x, grad = torch.randn(5, 32), torch.randn(5, 32)
    x[0, 3], x[2, 31], x[4, 0] = 3e8, -1e30, 2e4
    got, expected = run(rational, x, a, b, grad), yardstick(x, a, b, grad)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    x[1, 1] = float("nan")
    assert rational(x, a, b).isnan().nonzero().tolist() == [[1, 1]]
    assert rational(x.bfloat16(), a, b).isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_functions_differ_by_exactly_nothing_in_value_and_gradient(form, dtype):
    a, b = coefficients(3)
    x = (torch.randn(200, 3 * 37) * 4).to(dtype).requires_grad_()
    y = rational(x, a.clone().requires_grad_(), b, form=form, base=(a, b))
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()


def test_what_it_cannot_serve_goes_another_way(monkeypatch):
    ran = calls(monkeypatch)
    a, b = coefficients(4)
    for x in (torch.randn(3, 32).double(), torch.randn(3, 32).half(), torch.randn(3, 8)):
        y = rational(x, a, b)
        assert y.dtype == x.dtype
        assert normwise(y, rational_reference(x.double(), a.double(), b.double())) <= 1e-3
    assert not ran


def test_it_is_built_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path))
    native.library.cache_clear()
    native.library(2, 2, "abs-of-sum")
    (built,) = (tmp_path / "kernels").iterdir()
    written = built.stat().st_mtime_ns
    code = "from lit_adapters.ops import _rational_native as n; n.library(2, 2, 'abs-of-sum')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [f.stat().st_mtime_ns for f in (tmp_path / "kernels").iterdir()] == [written]
    native.library.cache_clear()


def test_a_compiler_called_by_its_c_name_serves_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "gcc")
    native.library.cache_clear()
    native.library(3, 2, "abs-of-sum")
    (built,) = (tmp_path / "kernels").iterdir()
    # In a fresh interpreter, where nothing has brought a C++ runtime along; libtorch has brought OpenMP.
    code = f"import ctypes, torch; ctypes.CDLL({str(built)!r}, mode=2)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert b"libstdc++" not in built.read_bytes()
    native.library.cache_clear()


@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "no place", "torn file"])
def test_without_the_kernel_it_warns_once_and_goes_on(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_broken", False)
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path))
    native.library.cache_clear()
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif fault == "compiler fails":
        monkeypatch.setenv("CXX", "false")
    elif fault == "no place":
        (tmp_path / "kernels").write_text("a file where the folder should be")
    else:
        with monkeypatch.context() as building:
            building.setattr(native.ctypes, "CDLL", lambda path: None)  # a loaded file would be used as it was
            native.library(5, 4, "abs-of-sum")
        (built,) = (tmp_path / "kernels").iterdir()
        built.write_bytes(b"torn")
        native.library.cache_clear()
    x, (a, b) = torch.randn(4, 64), coefficients(8)
    with pytest.warns(UserWarning, match="cannot be built here") as caught:
        y, again = rational(x, a, b), rational(x, a, b)
    assert len(caught) == 1
    assert torch.equal(y, again)
    assert normwise(y, rational_reference(x.double(), a.double(), b.double())) <= 1e-6
    native.library.cache_clear()
