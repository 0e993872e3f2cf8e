"""The kernels for aarch64: compiled for it and run by QEMU, where a cross compiler and the emulator are installed.

On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

import ctypes
import shutil
import subprocess

import pytest
import torch

from lit_adapters.ops import _compiler, _merged_native, _rational_native, _rescaled_native, rational, rational_reference
from lit_adapters.ops import _native as native
from tests.ops import test_merged_linear as weights
from tests.ops import test_rational_native as differences
from tests.ops import test_rescaled as gains
from tests.ops.test_rational import FORMS, coefficients, normwise

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no cross compiler and emulator for aarch64"),
]

# Calls a function of a library. An argument is a number, or the name of a file for the memory at an address.
CALL = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void (*Function)(long, long, long, long, long, long, long, long,
                         long, long, long, long, long, long, long, long);
int main(int count, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    long given[16] = {0}, sizes[16] = {0};
    for (int i = 3; i < count; ++i) {
        FILE *file = strchr(arguments[i], '/') ? fopen(arguments[i], "rb") : NULL;
        if (!file) { given[i - 3] = atol(arguments[i]); continue; }
        fseek(file, 0, SEEK_END);
        sizes[i - 3] = ftell(file);
        rewind(file);
        given[i - 3] = (long)malloc(sizes[i - 3]);
        if (fread((void *)given[i - 3], 1, sizes[i - 3], file) != sizes[i - 3]) return 2;
        fclose(file);
    }
    Function function = (Function)dlsym(library, arguments[2]);
    function(given[0], given[1], given[2], given[3], given[4], given[5], given[6], given[7], given[8], given[9],
             given[10], given[11], given[12], given[13], given[14], given[15]);
    for (int i = 3; i < count; ++i) {
        if (!sizes[i - 3]) continue;
        FILE *file = fopen(arguments[i], "wb");
        fwrite((void *)given[i - 3], 1, sizes[i - 3], file);
        fclose(file);
    }
}
"""


class EmulatedFunction:
    """A function of a library for aarch64, called like one that ctypes has loaded."""

    argtypes = None

    def __init__(self, folder, library, name, sizes):
        self.folder, self.library, self.name, self.sizes = folder, library, name, sizes

    def __call__(self, *arguments):
        given, memory = [], {}
        for i, (argument, kind) in enumerate(zip(arguments, self.argtypes, strict=True)):
            if kind is ctypes.c_void_p and argument is not None:
                held = isinstance(argument, ctypes.Array)
                address = ctypes.addressof(argument) if held else argument
                size = ctypes.sizeof(argument) if held else self.sizes[argument]
                memory[self.folder / str(i)] = address, size
                (self.folder / str(i)).write_bytes(ctypes.string_at(address, size))
                given.append(str(self.folder / str(i)))
            else:
                given.append(str(argument or 0))
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", self.folder / "call", self.library, self.name, *given]
        subprocess.run(command, check=True)
        for file, (address, size) in memory.items():
            ctypes.memmove(address, file.read_bytes(), size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the program that calls a function."""
    path = tmp_path_factory.mktemp("aarch64")
    (path / "call.c").write_text(CALL)
    openmp = ["-Wl,--no-as-needed", "-fopenmp"]  # the kernels use that of the program
    subprocess.run([COMPILER, *openmp, "-x", "c++", path / "call.c", "-ldl", "-o", path / "call"], check=True)
    return path


@pytest.fixture
def calls(folder, monkeypatch):
    """The kernels of this library are those for aarch64; a list of the functions that ran."""
    sizes, called = {}, []

    class Library:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            called.append(name)
            return EmulatedFunction(folder, self.file, name, sizes)

    def build(name, **macros):
        file = folder / "-".join([name, *map(str, macros.values())])
        if not file.exists():
            options = _compiler.options(macros, _compiler.INSTRUCTIONS["aarch64"][_compiler.NEON])
            file.write_bytes(_compiler.compile_library([COMPILER, *options], _compiler.source_of(name)[0]))
        return Library(file)

    def pointers(*tensors):
        sizes.update({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None})
        return native.pointers(*tensors)

    monkeypatch.setattr(native, "build", build)
    monkeypatch.setattr(native, "_broken", set())
    for module in (_rational_native, _merged_native, _rescaled_native):
        monkeypatch.setattr(module, "pointers", pointers)
    return called


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels", "groups"), [(600, 64, 8), (37, 33, 3), (37, 39, 3), (37, 14, 14)])
def test_rational_functions_with_every_rest(rows, channels, groups, dtype, form, calls):
    """Groups of 8, 11 and 13 elements leave 0, 3 and 1 beside vectors of 4; 14 functions leave 2."""
    torch.manual_seed(0)
    x = (2 * torch.randn(rows, channels)).to(dtype)
    given = [x.requires_grad_(), *(c.requires_grad_() for c in coefficients(groups))]
    wide = [t.detach().double().requires_grad_() for t in given]
    y, expected = rational(*given, form), rational_reference(*wide, form)
    grad = torch.randn(rows, channels).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert normwise(y, expected) <= tolerance
    assert normwise(x.grad, wide[0].grad) <= tolerance
    for ours, theirs in zip(given[1:], wide[1:], strict=True):
        assert normwise(ours.grad, theirs.grad) <= 1e-5
    assert len(calls) == 2
    assert all(str(dtype).split(".")[1] in name for name in calls)


# Tests of the kernels on this machine.
CASES = {
    "no difference": lambda: differences.test_equal_functions_differ_by_exactly_zero_in_value_and_gradient(
        3, "abs-of-sum", torch.float32
    ),
    "no difference, a channel each": lambda: (
        differences.test_equal_functions_differ_by_exactly_zero_in_value_and_gradient(111, "sum-of-abs", torch.bfloat16)
    ),
    "large and nan": lambda: differences.test_a_number_too_large_for_float32_powers_and_a_nan_beside_others(2),
    "large and nan, a channel each": lambda: (
        differences.test_a_number_too_large_for_float32_powers_and_a_nan_beside_others(32)
    ),
    "threads": lambda: differences.test_the_result_does_not_depend_on_the_number_of_threads(8),
    **{
        f"LoRAN, {function}": lambda function=function: weights.test_value_and_gradients_are_those_of_the_formula(
            function, "kernel"
        )
        for function in weights.SINUSOIDS
    },
    "LoRAN, bfloat16": lambda: weights.test_bfloat16_inputs_are_as_exact_as_they_can_be(
        "sinter", torch.bfloat16, "kernel"
    ),
    "LoRAN, thousands of radians": lambda: weights.test_arguments_of_thousands_of_radians_keep_their_phase("sinter"),
    "DoRA": lambda: gains.test_agrees_with_float64((300, 33), True, torch.float32, 1e-6),
    "DoRA, bfloat16": lambda: gains.test_agrees_with_float64((7, 41), False, torch.bfloat16, 1.2e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_tested_of_the_kernels_elsewhere(case, calls):
    torch.manual_seed(0)
    CASES[case]()
    assert calls
