"""Rational functions by rational.cpp, which is compiled at first use: about two seconds for a form and its degrees.

The library is kept in the cache folder ($LIT_ADAPTERS_CACHE, else ~/.cache/lit_adapters). It takes its threads from the
OpenMP runtime that PyTorch has loaded; a second one would compete with it. Any failure to build or load it means, after
one warning, the path that needs no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lit_adapters.ops._rational_math import Coefficients

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("rational.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC", "-w"]
_CHUNK = 1 << 15  # elements of a chunk of rows, forward and backward: x, dy and dx stay in a core's second-level cache
_SERIAL = 1 << 14  # elements that are not worth a second thread
_SHORTEST = 8  # elements of a group that stand together; fewer would waste the lanes of a vector
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_broken = False


def serves(x: Tensor) -> bool:
    """Whether this path can compute for `x`, (outer, G, K): not on a GPU, in another dtype, or without a compiler."""
    return not _broken and x.device.type == "cpu" and x.dtype in _DTYPES and x.shape[2] >= _SHORTEST


def compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++.

    Raises:
        OSError: there is none.
    """
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        raise OSError("no C++ compiler (g++ or clang++) on the PATH")
    return found


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def library(numerator: int, denominator: int, form: str) -> ctypes.CDLL:
    """The compiled functions for one form and its degrees.

    Raises:
        OSError: it could not be compiled, written or loaded.
    """
    command = [
        compiler(),
        *FLAGS,
        f"-DM={numerator}",
        f"-DN={denominator}",
        f"-DABS_OF_SUM={int(form == 'abs-of-sum')}",
    ]
    key = "\n".join([*command, SOURCE.read_text(), platform.platform(), _processor()])
    folder = Path(os.environ.get("LIT_ADAPTERS_CACHE") or "~/.cache/lit_adapters").expanduser() / "kernels"
    path = folder / f"rational-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        log.info("compiling the rational function of degrees (%d, %d), about two seconds", numerator, denominator)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            steps = [
                [*command, "-c", str(SOURCE), "-o", f"{scratch}/rational.o"],
                # Without -fopenmp: its symbols are those that PyTorch has brought along.
                [command[0], "-shared", f"{scratch}/rational.o", "-o", f"{scratch}/rational.so"],
            ]
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    raise OSError(f"{step[0]} failed: {done.stderr.strip()[:300]}")
            os.replace(f"{scratch}/rational.so", path)
    return ctypes.CDLL(str(path))


def _library(coefficients: Coefficients, form: str) -> ctypes.CDLL | None:
    global _broken
    try:
        return library(coefficients[0].shape[1] - 1, coefficients[1].shape[1], form)
    except OSError as error:
        _broken = True
        warnings.warn(
            f"the fast rational function cannot be built here ({error}); it runs in plain PyTorch operations, several "
            "times slower. A C++ compiler (g++ or clang++) on the PATH mends this.",
            stacklevel=2,
        )
        return None


def _floats(coefficients: Coefficients, base: Coefficients | None) -> list[Tensor | None]:
    tensors = [c.detach().to(torch.float32).contiguous() for c in (*coefficients, *(base or ()))]
    return [*tensors, *[None] * (4 - len(tensors))]


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def _sizes(x: Tensor, *more: int) -> list[ctypes._SimpleCData[int]]:
    threads = torch.get_num_threads() if x.numel() > _SERIAL else 1
    return [*(ctypes.c_int64(n) for n in (*x.shape, *more)), ctypes.c_int(threads)]


def forward(x: Tensor, y: Tensor, coefficients: Coefficients, base: Coefficients | None, form: str) -> bool:
    """Write R(x), or R(x) - R_base(x) where a base is given, to `y`; False where this path cannot serve `x`.

    Both are (outer, G, K), contiguous.
    """
    if (functions := _library(coefficients, form)) is None:
        return False
    floats = _floats(coefficients, base)
    functions[f"forward_{_DTYPES[x.dtype]}"](*_pointers(x, y, *floats), *_sizes(x))
    return True


def backward(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor,
    coefficients: Coefficients,
    base: Coefficients | None,
    form: str,
    need_coefficients: bool,
) -> Tensor | None:
    """Write the gradient of x to `grad_x`; return those of the coefficients, (G, m+1+n) in float64, or None as above.

    Chunks are added in float64 and in a fixed order: the sums do not depend on timing.
    """
    if (functions := _library(coefficients, form)) is None:
        return None
    outer, groups, length = x.shape
    rows = max(1, _CHUNK // max(1, groups * length))
    width = coefficients[0].shape[1] + coefficients[1].shape[1]
    sums = torch.zeros(-(-outer // rows), groups, width, dtype=torch.float64) if need_coefficients else None
    floats = _floats(coefficients, base)
    name = f"backward_{_DTYPES[x.dtype]}"
    functions[name](*_pointers(grad, x, grad_x, sums, *floats), *_sizes(x, rows))
    return torch.zeros(groups, width, dtype=torch.float64) if sums is None else sums.sum(0)
