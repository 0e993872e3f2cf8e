"""Kernels in C++ for the processor, compiled at first use and kept in the cache folder.

The folder is $LIT_ADAPTERS_CACHE, else ~/.cache/lit_adapters. A kernel takes its threads from the OpenMP runtime that
PyTorch has loaded, which knows what g++ writes; a second one would compete with it.
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
from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops.folders import cache_folder

log = logging.getLogger(__name__)

FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC", "-w"]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SERIAL = 1 << 14  # elements that are not worth a second thread

_broken: set[str] = set()  # kernels that could not be built or loaded


def compiler() -> str:
    """The C++ compiler: $CXX or g++.

    Raises:
        OSError: there is none.
    """
    candidates = [os.environ.get("CXX"), "g++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        raise OSError("no C++ compiler (g++) on the PATH")
    return found


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def build(name: str, **macros: int) -> ctypes.CDLL:
    """The functions of NAME.cpp beside this file, compiled with these macros.

    Raises:
        OSError: it could not be compiled, written or loaded.
    """
    source, header = (Path(__file__).with_name(file) for file in (f"{name}.cpp", "vectors.h"))
    command = [compiler(), *FLAGS, *(f"-D{macro}={value}" for macro, value in macros.items())]
    key = "\n".join([*command, source.read_text(), header.read_text(), platform.platform(), _processor()])
    folder = cache_folder() / "kernels"
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        log.info("compiling %s.cpp %s, about two seconds", name, macros or "")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            steps = [
                [*command, "-c", str(source), "-o", f"{scratch}/kernel.o"],
                # Without -fopenmp: its symbols are those that PyTorch has brought along.
                [command[0], "-shared", f"{scratch}/kernel.o", "-lm", "-o", f"{scratch}/kernel.so"],
            ]
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    raise OSError(f"{step[0]} failed: {done.stderr.strip()[:300]}")
            os.replace(f"{scratch}/kernel.so", path)
    return ctypes.CDLL(str(path))


def usable(name: str) -> bool:
    """Whether the kernel has not failed to build or load yet."""
    return name not in _broken


def library(name: str, what: str, **macros: int) -> ctypes.CDLL | None:
    """`build`; where that fails, None and, once for each kernel, a warning that `what` goes the slow way."""
    try:
        return build(name, **macros)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _broken.add(name)
        warnings.warn(
            f"the fast {what} cannot be built here ({error}); it runs in plain PyTorch operations, several times "
            "slower. g++ on the PATH (with CXX unset) and a folder to write to (LIT_ADAPTERS_CACHE) mend this.",
            stacklevel=2,
        )
        return None


def function(functions: ctypes.CDLL, name: str, pointers: int, sizes: int) -> Any:
    """The function NAME, which takes so many addresses and whole numbers, then the number of threads."""
    found = getattr(functions, name)
    if found.argtypes is None:  # once declared, Python's own numbers will do
        found.argtypes = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes, ctypes.c_int]
        found.restype = None
    return found


def in_memory(*tensors: Tensor | None) -> bool:
    """Whether all are values in the processor's memory: no shards, stand-ins without values, or batches of vmap."""
    given = (t for t in tensors if t is not None)
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and torch._C._has_storage(t) for t in given)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where tensors lie in memory; None is no place."""
    return [None if t is None else t.data_ptr() for t in tensors]


def threads(elements: int) -> int:
    """How many threads should share this many elements."""
    return torch.get_num_threads() if elements > _SERIAL else 1
