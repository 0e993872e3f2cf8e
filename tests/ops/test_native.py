"""C++ kernels: built once, kept, loaded by other processes, and replaced by operations if they cannot be built."""

import subprocess
import sys

import pytest
import torch

from lit_adapters.activations.weight_functions import WeightUpdate
from lit_adapters.ops import _native as native
from lit_adapters.ops import rational, rational_reference
from lit_adapters.ops.merged_linear import merged_weight
from lit_adapters.ops.rescaled import scale_without_bias as rescaled
from tests.ops.test_rational import coefficients, normwise


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The folder for kernels, empty, as if this process had not built any."""
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_broken", set())
    native.build.cache_clear()
    yield tmp_path / "kernels"
    native.build.cache_clear()


def test_it_is_built_once_for_all_processes(kernels):
    native.build("merged")
    (built,) = kernels.iterdir()
    written = built.stat().st_mtime_ns
    code = "from lit_adapters.ops import _native as n; n.build('merged')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [f.stat().st_mtime_ns for f in kernels.iterdir()] == [written]


def test_a_change_of_what_is_compiled_makes_another(kernels):
    native.build("rational", M=2, N=2, ABS_OF_SUM=1)
    native.build("rational", M=2, N=2, ABS_OF_SUM=0)
    native.build("rational", M=2, N=2, ABS_OF_SUM=1)
    assert len(list(kernels.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "macros"), [("rational", {"M": 3, "N": 2, "ABS_OF_SUM": 1}), ("merged", {}), ("rescaled", {})]
)
def test_a_compiler_called_by_its_c_name_works_too(name, macros, kernels, monkeypatch):
    monkeypatch.setenv("CXX", "gcc")
    native.build(name, **macros)
    (built,) = kernels.iterdir()
    # In a fresh interpreter, where nothing has brought a C++ runtime along; libtorch has brought OpenMP.
    code = f"import ctypes, torch; ctypes.CDLL({str(built)!r}, mode=2)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert b"libstdc++" not in built.read_bytes()


def rational_twice():
    """Errors of two calls against float64."""
    x, (a, b) = torch.randn(4, 64), coefficients(8)
    expected = rational_reference(x.double(), a.double(), b.double())
    return [normwise(rational(x, a, b), expected) for _ in range(2)]


def merged_twice():
    update = WeightUpdate("sinter", 2.0, 0.1, True)
    a, b, w, matrix = torch.randn(4, 40), torch.randn(30, 4), torch.tensor(3.0), torch.randn(30, 40)
    expected = matrix.double() + update.value(b.double() @ a.double(), w.double())
    with torch.no_grad():
        return [normwise(merged_weight(matrix, a, b, w, update, torch.float32), expected) for _ in range(2)]


def rescaled_twice():
    y, change, bias = torch.randn(6, 40), torch.randn(40), torch.randn(40)
    expected = y.double() + change.double() * (y.double() - bias)
    return [normwise(rescaled(y, change, bias), expected) for _ in range(2)]


KERNELS = {
    "rational": (rational_twice, {"M": 5, "N": 4, "ABS_OF_SUM": 1}),
    "merged": (merged_twice, {}),
    "rescaled": (rescaled_twice, {}),
}


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "no place", "torn file"])
def test_without_the_kernel_it_warns_once_and_goes_on(fault, name, kernels, tmp_path, monkeypatch):
    twice, macros = KERNELS[name]
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif fault == "compiler fails":
        monkeypatch.setenv("CXX", "false")
    elif fault == "no place":
        kernels.write_text("a file where the folder should be")
    else:
        with monkeypatch.context() as building:
            building.setattr(native.ctypes, "CDLL", lambda path: None)  # a loaded file would be used as it was
            native.build(name, **macros)
        (built,) = kernels.iterdir()
        built.write_bytes(b"torn")
        native.build.cache_clear()
    with pytest.warns(UserWarning, match="cannot be built here") as caught:
        errors = twice()
    assert len(caught) == 1
    assert max(errors) <= 1e-6
