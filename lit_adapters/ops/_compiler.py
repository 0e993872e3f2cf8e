"""The C++ compiler, and the kernels that a wheel brings along.

setup.py loads this file alone, so it imports nothing of the package and no PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC", "-w"]
NATIVE = ["-march=native"]
SECONDS = 60  # a kernel takes two, on a busy machine twenty

# What a wheel's kernels are compiled for: by machine, then on x86-64 by PyTorch's name for what the processor can do.
# The kernels have no use for bfloat16 instructions. Every aarch64 processor has NEON.
NEON = "NEON"
INSTRUCTIONS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "AVX2": ["-mavx2", "-mfma"],
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    },
    "aarch64": {NEON: ["-march=armv8-a"]},
}
# The rational functions of NoRA's own degrees; other degrees are compiled at first use.
SHIPPED: list[tuple[str, dict[str, int]]] = [
    ("rational", {"M": 5, "N": 4, "ABS_OF_SUM": 1}),
    ("rational", {"M": 5, "N": 4, "ABS_OF_SUM": 0}),
    ("merged", {}),
    ("rescaled", {}),
]


def compiler() -> str:
    """The path of the C++ compiler: $CXX if it can be found, else g++.

    Raises:
        OSError: Neither is on the PATH.
    """
    candidates = [os.environ.get("CXX"), "g++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        raise OSError("no C++ compiler (g++) on the PATH")
    return found


def options(macros: Mapping[str, int], instructions: list[str]) -> list[str]:
    """What the compiler is told.

    Args:
        macros: Values of the macros of the file.
        instructions: Options that say for which processor.
    """
    return [*FLAGS, *instructions, *(f"-D{macro}={value}" for macro, value in macros.items())]


def source_of(name: str) -> tuple[Path, str]:
    """The C++ file of a kernel, and the text that it is made of."""
    file, header = (Path(__file__).with_name(file) for file in (f"{name}.cpp", "vectors.h"))
    return file, file.read_text() + header.read_text()


def shipped(name: str, macros: Mapping[str, int], machine: str, capability: str) -> Path | None:
    """Where a wheel has the compiled kernel; None for one that no wheel has.

    The name of the file holds a digest of source and options, so that a changed source is never taken for it.

    Args:
        name: Of the C++ file, without its suffix.
        macros: Values of the macros of the file.
        machine: Of this computer, as `platform.machine` names it.
        capability: PyTorch's name for what the processor can do; ignored on aarch64, where every processor has NEON.
    """
    known = INSTRUCTIONS.get(machine, {})
    capability = NEON if machine == "aarch64" else capability
    if (name, dict(macros)) not in SHIPPED or capability not in known:
        return None
    text = "\n".join([*options(macros, known[capability]), source_of(name)[1]])
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    return Path(__file__).with_name("shipped") / f"{name}-{capability.lower()}-{digest}.so"


def compile_library(command: list[str], source: Path) -> bytes:
    """The library that a C++ file compiles to.

    Args:
        command: The compiler and its options.
        source: The file.

    Raises:
        OSError: The compiler fails, or does not end in time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        steps = [
            [*command, "-c", str(source), "-o", f"{scratch}/kernel.o"],
            # Without -fopenmp, so that no OpenMP runtime is linked: PyTorch has loaded one.
            [command[0], "-shared", f"{scratch}/kernel.o", "-lm", "-o", f"{scratch}/kernel.so"],
        ]
        for step in steps:
            _run(step)
        return Path(scratch, "kernel.so").read_bytes()


def _run(step: list[str]) -> None:
    # In a session of its own, so that what the compiler has started ends with it.
    none = subprocess.DEVNULL
    with subprocess.Popen(
        step, stdin=none, stdout=none, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            _, complaint = process.communicate(timeout=SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{step[0]} did not end within {SECONDS} s") from None
            raise
    if process.returncode:
        raise OSError(f"{step[0]} failed: {complaint.strip()[:300]}")
