"""How the wheel is built; pyproject.toml has everything else.

With LIT_ADAPTERS_KERNELS=1 the wheel brings its C++ kernels along, compiled for x86-64 processors with AVX2 and with
AVX-512, and needs no compiler where it is installed. `make wheel` builds this one.
"""

import os
import platform
import re
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_KERNELS = os.environ.get("LIT_ADAPTERS_KERNELS") == "1"
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
        if WITH_KERNELS:
            if (platform.system(), platform.machine(), platform.libc_ver()[0]) != ("Linux", "x86_64", "glibc"):
                raise SystemExit("error: LIT_ADAPTERS_KERNELS=1 works on Linux with glibc on x86-64 alone")
            folder.mkdir()
            compile_kernels(folder)


class WheelWithKernels(bdist_wheel):
    """Names the platform of a wheel with kernels. One wheel serves all versions of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "manylinux_{}_{}_x86_64".format(*GLIBC)) if WITH_KERNELS else super().get_tag()


class PlatformDistribution(Distribution):
    """A wheel with kernels belongs to a platform."""

    def has_ext_modules(self) -> bool:
        return WITH_KERNELS


def compile_kernels(folder: Path) -> None:
    """Write the compiled kernels to a folder."""
    spec = spec_from_file_location("compiler", Path(__file__).parent / OPS / "_compiler.py")
    compiler = module_from_spec(spec)
    spec.loader.exec_module(compiler)
    for name, macros in compiler.SHIPPED:
        for capability, instructions in compiler.INSTRUCTIONS.items():
            command = [compiler.compiler(), *compiler.options(macros, instructions)]
            library = compiler.compile_library(command, compiler.source_of(name)[0])
            versions = [tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+\.\d+)", library)]
            if any(version > GLIBC for version in versions):
                raise SystemExit(f"error: the kernel {name} asks for glibc {max(versions)}: raise GLIBC in setup.py")
            (folder / compiler.shipped(name, macros, capability).name).write_bytes(library)


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
