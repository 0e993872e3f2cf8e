"""Kernels in C++ for the CPU: those of the wheel, and others compiled at first use and kept in the cache folder.

A library runs as code, so one from the folder `kernels` of the cache folder is loaded only if it is a file of this user
(or of root) that nobody else can write to, and matches its checksum. Any other is compiled anew.

This takes the place of torch.utils.cpp_extension.load, which needs ninja and does not rebuild a kernel for another
processor. A kernel here includes no header of PyTorch or Python: it compiles in 2 s, where one that does takes 20.

A kernel uses the OpenMP runtime that PyTorch has loaded, which also offers the functions that g++ calls; a second
runtime would compete with it for the processor. PyTorch's builds for aarch64 hide its functions from other libraries;
`_offer_openmp` makes them visible.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adapters.ops import _compiler
from lit_adapters.ops.folders import cache_folder, is_private_file, private_folder

log = logging.getLogger(__name__)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SERIAL = 1 << 14  # up to so many elements, one thread is faster than several

_DIGEST = hashlib.sha256().digest_size

# Lines of /proc/cpuinfo, on x86-64 and on aarch64.
_PROPERTIES = ("flags", "model name", "Features", "CPU implementer", "CPU part", "CPU variant")

_broken: set[str] = set()  # kernels that could not be built or loaded


@functools.cache
def _processor() -> str:
    """The properties of the processor that the meaning of -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "\n".join(sorted({line for line in lines if line.startswith(_PROPERTIES)}))


@functools.cache
def build(name: str, **macros: int) -> ctypes.CDLL:
    """Load a kernel from the wheel or the cache, or compile it.

    Args:
        name: The name of a C++ file beside this one, without its suffix.
        **macros: Values of the macros that the file is compiled with.

    Returns:
        The loaded library with the functions of the file.

    Raises:
        OSError: The file cannot be compiled, written or loaded.
    """
    _offer_openmp()
    shipped = _compiler.shipped(name, macros, platform.machine(), torch.backends.cpu.get_cpu_capability())
    if shipped is not None and shipped.is_file():
        return ctypes.CDLL(str(shipped))
    source, text = _compiler.source_of(name)
    command = [_compiler.compiler(), *_compiler.options(macros, _compiler.NATIVE)]
    key = "\n".join([*command, text, platform.platform(), _processor()])
    file = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    path = _folder() / file
    if not _intact(path):
        log.info("compiling %s.cpp %s, about two seconds", name, macros or "")
        library = _compiler.compile_library(command, source)
        try:
            _write(path, library)
        except OSError as error:
            path = _own_folder(error) / file
            _write(path, library)
    return ctypes.CDLL(str(path))


class _Symbol(ctypes.Structure):
    """What the loader's `dladdr` tells of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@functools.cache
def _offer_openmp() -> None:
    """Make the functions of PyTorch's OpenMP runtime visible to kernels, where PyTorch's build hides them."""
    if sys.platform != "linux" or hasattr(loaded := ctypes.CDLL(None), "GOMP_parallel"):
        return
    try:
        used = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):  # a build without OpenMP; loading the kernel then says what it lacks
        return
    runtime = _Symbol()
    if loaded.dladdr(ctypes.cast(used, ctypes.c_void_p), ctypes.byref(runtime)):
        ctypes.CDLL(os.fsdecode(runtime.file), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)


def _folder() -> Path:
    """The folder for kernels in the cache, or one of this process where that cannot be made or trusted."""
    try:
        return private_folder(cache_folder() / "kernels")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return _own_folder(error)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lit_adapters_kernels_")


def _own_folder(reason: Exception) -> Path:
    """A folder that is removed when this process ends; the first call warns with the `reason` for it."""
    if not _scratch.cache_info().currsize:
        warnings.warn(
            f"compiled kernels cannot be kept ({reason}), so each process compiles them anew, about two seconds for "
            "each. To fix it, set LIT_ADAPTERS_CACHE to a folder of your own that can be written to.",
            stacklevel=2,
        )
    return Path(_scratch().name)


def _intact(path: Path) -> bool:
    """Whether a library is a private file that ends in the SHA-256 of what stands before.

    The loader of the system ignores what stands behind the library. One file for both is always replaced as a whole.
    """
    if not is_private_file(path):
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _write(path: Path, library: bytes) -> None:
    """Put a library and its checksum in the cache, for this user alone, in one step."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(library + hashlib.sha256(library).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def usable(name: str) -> bool:
    """Whether the kernel has not failed to build or load yet."""
    return name not in _broken


def library(name: str, what: str, **macros: int) -> ctypes.CDLL | None:
    """As `build`, but None if that fails, with one warning for each kernel.

    Args:
        name: As for `build`.
        what: What the kernel computes, for the warning.
        **macros: As for `build`.
    """
    try:
        return build(name, **macros)
    except OSError as error:
        _broken.add(name)
        warnings.warn(
            f"the fast {what} cannot be built or loaded here ({error}); it runs in plain PyTorch operations, several "
            "times slower. Where a compiler is missing, put g++ on the PATH, with CXX unset.",
            stacklevel=2,
        )
        return None


def function(functions: ctypes.CDLL, name: str, pointers: int, sizes: int) -> Any:
    """A function of a loaded library, declared for ctypes.

    Args:
        functions: The library.
        name: The name of the function.
        pointers: How many addresses it takes; they come first.
        sizes: How many whole numbers it takes after them; the number of threads comes last.
    """
    found = getattr(functions, name)
    if found.argtypes is None:  # declared, it takes Python's own numbers
        found.argtypes = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes, ctypes.c_int]
        found.restype = None
    return found


def in_memory(*tensors: Tensor | None) -> bool:
    """Whether all tensors have their values in the CPU's memory: no shards, fake tensors, or batches of vmap."""
    given = (t for t in tensors if t is not None)
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and torch._C._has_storage(t) for t in given)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """The addresses of tensors; None for None."""
    return [None if t is None else t.data_ptr() for t in tensors]


def threads(elements: int) -> int:
    """How many threads should compute so many elements."""
    return torch.get_num_threads() if elements > _SERIAL else 1
