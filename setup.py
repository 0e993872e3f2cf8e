"""How the wheel is built; pyproject.toml has everything else.

With LIT_ADAPTERS_KERNELS=1 the wheel has its C++ kernels compiled for the machine that builds it: x86-64 (AVX2 and
AVX-512) or aarch64 (NEON). Such a wheel needs no compiler where it is installed. `make wheel` builds it.
LIT_ADAPTERS_KERNELS=aarch64 with CXX=aarch64-linux-gnu-g++ builds it for aarch64 on another machine with Linux
(`make wheel-aarch64`).
"""

import os
import platform
import re
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ASKED = os.environ.get("LIT_ADAPTERS_KERNELS", "0")
MACHINE = {"": None, "0": None, "1": platform.machine()}.get(ASKED, ASKED)  # that kernels are compiled for
GLIBC = (2, 17)  # the oldest C library that the compiled kernels may ask for
OPS = Path("lit_adapters", "ops")


class BuildWithKernels(build_py):
    """Copies the package, and compiles its kernels if asked to."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, OPS, "shipped")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier wheel
        if MACHINE:
            folder.mkdir()
            compile_kernels(folder)


class WheelWithKernels(bdist_wheel):
    """Names the platform of a wheel with kernels. One wheel serves all versions of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "manylinux_{}_{}_{}".format(*GLIBC, MACHINE)) if MACHINE else super().get_tag()


class PlatformDistribution(Distribution):
    """A wheel with kernels belongs to a platform."""

    def has_ext_modules(self) -> bool:
        return bool(MACHINE)


def check_compiler(compiler: ModuleType) -> None:
    """Check that there is a compiler, and that it compiles for `MACHINE` with glibc.

    Raises:
        SystemExit: It does not.
    """
    chosen = os.environ.get("CXX")
    if chosen and not shutil.which(chosen):
        raise SystemExit(
            f"error: the compiler CXX={chosen} is not on the PATH: install it (Debian has a package of that name), "
            "or unset CXX to use g++"
        )
    try:
        found = compiler.compiler()
        makes = subprocess.run([found, "-dumpmachine"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: no compiler for the kernels: {error}") from error
    machine, *rest = makes.split("-")  # as x86_64-linux-gnu, x86_64-redhat-linux or x86_64-conda-linux-gnu
    others = ("musl", "android", "x32", "ilp32")
    if machine != MACHINE or "linux" not in rest or any(word in rest[-1] for word in others):
        raise SystemExit(
            f"error: {found} compiles for {makes}, but the kernels are for {MACHINE} and glibc; set CXX, for instance "
            f"CXX={MACHINE}-linux-gnu-g++"
        )


def compile_kernels(folder: Path) -> None:
    """Write the compiled kernels to a folder.

    Raises:
        SystemExit: There are no kernels for this system or machine, there is no compiler for it, or a kernel asks for a
            newer C library than `GLIBC`.
    """
    spec = spec_from_file_location("compiler", Path(__file__).parent / OPS / "_compiler.py")
    compiler = module_from_spec(spec)
    spec.loader.exec_module(compiler)
    known = compiler.INSTRUCTIONS
    if (platform.system(), platform.libc_ver()[0]) != ("Linux", "glibc") or MACHINE not in known:
        raise SystemExit(
            f"error: LIT_ADAPTERS_KERNELS={ASKED} on {platform.system()}, {platform.machine()}: kernels are compiled "
            f"on Linux with glibc, for {' or '.join(known)}; without LIT_ADAPTERS_KERNELS the wheel works anywhere"
        )
    check_compiler(compiler)
    for name, macros in compiler.SHIPPED:
        for capability, instructions in known[MACHINE].items():
            command = [compiler.compiler(), *compiler.options(macros, instructions)]
            library = compiler.compile_library(command, compiler.source_of(name)[0])
            versions = [tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+\.\d+)", library)]
            if any(version > GLIBC for version in versions):
                raise SystemExit(f"error: the kernel {name} asks for glibc {max(versions)}: raise GLIBC in setup.py")
            (folder / compiler.shipped(name, macros, MACHINE, capability).name).write_bytes(library)


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
