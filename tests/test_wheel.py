"""The wheel with compiled kernels: it needs no compiler and writes nothing into the cache folder."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from lit_adapters.ops import _compiler

ROOT = Path(__file__).parents[1]
MACHINE = platform.machine()
CROSS = "aarch64-linux-gnu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        MACHINE not in _compiler.INSTRUCTIONS or platform.libc_ver()[0] != "glibc", reason="no kernels for this machine"
    ),
]

# Every kernel, twice, where a warning is an error. tests/ comes from the checkout, the library from the wheel.
USE = """
import sys
sys.path[:0] = [{wheel!r}, {root!r}]
import lit_adapters, torch
assert lit_adapters.__file__.startswith({wheel!r})
from lit_adapters.ops import _native
from lit_adapters.ops.rational import rational, rational_reference
from tests.ops.test_native import merged_twice, rational_twice, rescaled_twice
from tests.ops.test_rational import coefficients, normwise
assert {capability!r} in (torch.backends.cpu.get_cpu_capability(), "NEON")
torch.manual_seed(0)
x, (a, b) = torch.randn(4, 64), coefficients(8)
expected = rational_reference(x.double(), a.double(), b.double(), "sum-of-abs")
other = normwise(rational(x, a, b, "sum-of-abs"), expected)
errors = [*rational_twice(), *merged_twice(), *rescaled_twice(), other]
assert max(errors) <= 1e-6, errors
loaded = {{line.split("/")[-1] for line in open("/proc/self/maps") if "/ops/shipped/" in line}}
print(len(loaded))
"""


def built(folder, **environment):
    """The wheel that pip builds from a copy of the checkout."""
    pytest.importorskip("setuptools")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "lit_adapters", source / "lit_adapters", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    everything = {"check": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    subprocess.run(command, cwd=source, env={**os.environ, **environment}, **everything)
    (wheel,) = folder.glob("*.whl")
    return wheel


def compiler_of(name, folder):
    """The compiler of this name; of "of:TARGET", g++ that says it compiles for another target."""
    if not name.startswith("of:"):
        return name
    file = folder / "compiler"
    file.write_text(f'#!/bin/sh\n[ "$1" = -dumpmachine ] && echo {name[3:]} && exit\nexec g++ "$@"\n')
    file.chmod(0o755)
    return str(file)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel with kernels, unpacked. Its compiler calls the target by a name that is not Debian's."""
    folder = tmp_path_factory.mktemp("wheel")
    file = built(folder, LIT_ADAPTERS_KERNELS="1", CXX=compiler_of(f"of:{MACHINE}-redhat-linux", folder))
    assert file.name.endswith(f"-py3-none-manylinux_2_17_{MACHINE}.whl")
    ZipFile(file).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.parametrize("capability", list(_compiler.INSTRUCTIONS.get(MACHINE, ())))
def test_the_wheel_needs_no_compiler(wheel, capability, tmp_path):
    if capability == "AVX512" and torch.backends.cpu.get_cpu_capability() != capability:
        pytest.skip("this processor has no AVX-512")
    code = USE.format(wheel=str(wheel), root=str(ROOT), capability=capability)
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment |= {
        "PATH": str(tmp_path),
        "LIT_ADAPTERS_CACHE": str(tmp_path / "cache"),
        **({"ATEN_CPU_CAPABILITY": capability.lower()} if MACHINE == "x86_64" else {}),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lit_adapters", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr
    assert run.stdout.split() == [str(len(_compiler.SHIPPED))]
    assert "cannot be built" not in run.stderr
    assert not (tmp_path / "cache").exists()


def test_a_changed_source_is_not_taken_for_the_compiled_one(wheel, monkeypatch):
    name, macros = _compiler.SHIPPED[0]
    monkeypatch.setattr(_compiler, "__file__", str(wheel / "lit_adapters" / "ops" / "_compiler.py"))
    capability = next(iter(_compiler.INSTRUCTIONS[MACHINE]))
    path = _compiler.shipped(name, macros, MACHINE, capability)
    assert path.is_file()
    source = wheel / "lit_adapters" / "ops" / f"{name}.cpp"
    text = source.read_text()
    source.write_text(text + "\n")
    assert not _compiler.shipped(name, macros, MACHINE, capability).exists()
    source.write_text(text)
    assert _compiler.shipped(name, macros, "x86_64", "DEFAULT") is None
    assert _compiler.shipped(name, macros, "riscv64", "DEFAULT") is None
    assert _compiler.shipped(name, {"M": 3, "N": 2, "ABS_OF_SUM": 1}, "x86_64", "AVX2") is None


def test_on_aarch64_any_processor_has_the_kernels():
    name, macros = _compiler.SHIPPED[0]
    paths = {_compiler.shipped(name, macros, "aarch64", capability) for capability in ("DEFAULT", "SVE256")}
    assert [path.name.rsplit("-", 1)[0] for path in paths] == ["rational-neon"]


@pytest.mark.skipif(not shutil.which(f"{CROSS}-g++"), reason=f"no {CROSS}-g++")
def test_it_is_built_for_another_machine(tmp_path):
    file = built(tmp_path, LIT_ADAPTERS_KERNELS="aarch64", CXX=f"{CROSS}-g++")
    assert file.name.endswith("-py3-none-manylinux_2_17_aarch64.whl")
    with ZipFile(file) as wheel:
        kernels = [wheel.read(name) for name in wheel.namelist() if name.endswith(".so")]
    assert len(kernels) == len(_compiler.SHIPPED)
    assert {kernel[18] for kernel in kernels} == {183}  # ELF's number of the machine


@pytest.mark.parametrize(
    ("machine", "compiler", "message"),
    [
        ("sparc64", "g++", "LIT_ADAPTERS_KERNELS=sparc64 on Linux, .*: kernels are compiled .* for x86_64 or aarch64"),
        ("1", "no-such-compiler", "CXX=no-such-compiler is not on the PATH"),
        ("1", "false", "no compiler for the kernels: .*'-dumpmachine'"),
        ("1", "of:sparc64-linux-gnu", "compiles for sparc64-linux-gnu, but the kernels are for .*; set CXX"),
        ("1", f"of:{MACHINE}-linux-musl", "compiles for .*-linux-musl, but the kernels are for .* and glibc"),
    ],
)
def test_what_cannot_be_compiled_is_said(machine, compiler, message, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        built(tmp_path, LIT_ADAPTERS_KERNELS=machine, CXX=compiler_of(compiler, tmp_path))
    assert re.search(message, failed.value.stdout)


def test_without_kernels_the_wheel_is_for_any_platform(tmp_path):
    file = built(tmp_path, LIT_ADAPTERS_KERNELS="0")
    assert file.name.endswith("-py3-none-any.whl")
    assert not [name for name in ZipFile(file).namelist() if name.endswith(".so")]
