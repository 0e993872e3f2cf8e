"""C++ kernels: built once, kept, loaded by other processes, and loaded only if nobody else can have written them."""

import ctypes
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_adapters.activations.weight_functions import WeightUpdate
from lit_adapters.ops import _compiler, rational, rational_reference
from lit_adapters.ops import _native as native
from lit_adapters.ops.merged_linear import merged_weight
from lit_adapters.ops.rescaled import scale_without_bias as rescaled
from tests.mutations import byte_edits
from tests.ops.test_rational import coefficients, normwise


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The folder for kernels, empty, as if this process had not built any."""
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_broken", set())
    native.build.cache_clear()
    yield tmp_path / "kernels"
    native.build.cache_clear()


@pytest.fixture(scope="module")
def compiled():
    """What the compiler makes of one kernel."""
    return _compiler.compile_library([_compiler.compiler(), *_compiler.FLAGS], _compiler.source_of("rescaled")[0])


@pytest.fixture
def compilations(compiled, monkeypatch):
    """A list that grows with each compilation, which takes no time."""
    found = []

    def at_once(command, source):
        found.append(source.stem)
        return compiled

    monkeypatch.setattr(_compiler, "compile_library", at_once)
    return found


@pytest.mark.slow
def test_it_is_built_once_for_all_processes(kernels):
    native.build("merged")
    (built,) = kernels.iterdir()
    written = built.stat().st_mtime_ns
    code = "from lit_adapters.ops import _native as n; n.build('merged')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [f.stat().st_mtime_ns for f in kernels.iterdir()] == [written]


@pytest.mark.slow
def test_a_change_of_what_is_compiled_makes_another(kernels):
    native.build("rational", M=2, N=2, ABS_OF_SUM=1)
    native.build("rational", M=2, N=2, ABS_OF_SUM=0)
    native.build("rational", M=2, N=2, ABS_OF_SUM=1)
    assert len(list(kernels.iterdir())) == 2


@pytest.mark.slow
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


@pytest.mark.skipif(sys.platform != "linux", reason="only PyTorch's builds for Linux hide it")
@pytest.mark.parametrize("hidden", [True, False])
def test_the_openmp_of_pytorch_is_made_visible_where_it_is_hidden(hidden, monkeypatch):
    real, opened = ctypes.CDLL, []

    def load(file, mode=ctypes.DEFAULT_MODE):
        if file is None:
            return SimpleNamespace(dladdr=real(None).dladdr, **({} if hidden else {"GOMP_parallel": None}))
        opened.append((Path(file).name, mode))
        return real(file, mode)

    monkeypatch.setattr(ctypes, "CDLL", load)
    native._offer_openmp.__wrapped__()
    if not hidden:
        assert not opened
        return
    (torch_library, _), (runtime, mode) = opened
    assert torch_library == "libtorch_cpu.so"
    assert "omp" in runtime
    assert mode == ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)  # on Windows, ctypes.CDLL(None) fails
    native._offer_openmp.__wrapped__()


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("fault", ["no compiler", "compiler fails"])
def test_without_the_kernel_it_warns_once_and_goes_on(fault, name, kernels, tmp_path, monkeypatch):
    twice, _ = KERNELS[name]
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="cannot be built or loaded here") as caught:
        errors = twice()
    assert len(caught) == 1
    assert max(errors) <= 1e-6


def test_a_compiler_that_does_not_end_is_stopped_with_what_it_started(kernels, tmp_path, monkeypatch):
    stuck = tmp_path / "stuck"
    stuck.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("CXX", str(stuck))
    monkeypatch.setattr(_compiler, "SECONDS", 0.5)
    with pytest.warns(UserWarning, match="stuck did not end within 0.5 s"):
        assert max(rescaled_twice()) <= 1e-6
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")

    def runs() -> bool:
        try:
            return child.read_text().split()[2] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    end = time.monotonic() + 10  # a killed process ends when the system next gives it time
    while runs():
        assert time.monotonic() < end
        time.sleep(0.01)


def build_without_loading(monkeypatch):
    """Build one kernel, as a process that has loaded a file goes on with its content."""
    with monkeypatch.context() as building:
        building.setattr(native.ctypes, "CDLL", lambda path: None)
        native.build("rescaled")
    native.build.cache_clear()


def test_a_damaged_library_is_compiled_anew(kernels, compilations, monkeypatch):
    build_without_loading(monkeypatch)
    (built,) = kernels.iterdir()
    sound = built.read_bytes()
    damages = [b"", b"torn", sound[:4096], sound[:-1], *(damaged for _, damaged in byte_edits(sound, 100))]
    for damaged in damages:
        built.write_bytes(damaged)
        assert native._intact(built) == (damaged == sound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(rescaled_twice()) <= 1e-6
    assert built.read_bytes() == sound
    assert len(compilations) == 2


@pytest.mark.parametrize("plant", ["a link", "writable by others", "of another user", "without a checksum"])
def test_a_library_that_may_come_from_others_is_compiled_anew(plant, kernels, compilations, tmp_path, monkeypatch):
    build_without_loading(monkeypatch)
    (built,) = kernels.iterdir()
    sound = built.read_bytes()
    if plant == "a link":
        built.rename(tmp_path / "elsewhere")
        built.symlink_to(tmp_path / "elsewhere")
    elif plant == "writable by others":
        built.chmod(0o666)
    elif plant == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(built, 12345, 12345)
    else:
        built.write_bytes(sound[:-32])
    assert not native._intact(built)
    assert max(rescaled_twice()) <= 1e-6
    assert built.read_bytes() == sound
    assert len(compilations) == 2
    assert stat.S_IMODE(built.lstat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["a file", "a link", "of another user", "full", "no home"])
def test_without_a_place_that_can_be_trusted_a_process_keeps_kernels_for_itself(
    place, kernels, compilations, tmp_path, monkeypatch
):
    if place == "a file":
        kernels.write_text("a file where the folder should be")
    elif place == "a link":
        kernels.symlink_to(tmp_path)
    elif place == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        kernels.mkdir()
        os.chown(kernels, 12345, 12345)
    elif place == "full":
        write = native._write

        def full(path, library):
            if path.parent == kernels:
                raise OSError(28, "No space left on device")
            write(path, library)

        monkeypatch.setattr(native, "_write", full)
    else:
        monkeypatch.setenv("LIT_ADAPTERS_CACHE", "")
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    native._scratch.cache_clear()
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept") as caught:
        errors = rescaled_twice()
    assert len(caught) == 1
    assert max(errors) <= 1e-6
    assert not kernels.is_dir() or not list(kernels.glob("*.so"))


def test_others_can_neither_read_nor_write_what_is_kept(kernels, compilations):
    before = os.umask(0)
    try:
        kernels.mkdir(mode=0o777)
        native.build("rescaled")
    finally:
        os.umask(before)
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in kernels.iterdir()] == [0o600]
