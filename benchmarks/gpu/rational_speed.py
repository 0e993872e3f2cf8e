"""How long do the Triton kernels of the rational function take, beside GELU and beside copying as many bytes?

A forward pass reads x and writes y, as a copy does; forward and backward also read x and the gradient of y and write
that of x, which is 2.5 copies. GELU is eager or compiled, whichever is faster. FlashKAT's kernel computes the
sum-of-abs form, where its package is installed; it takes float32 alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.rational_errors import coefficients
from benchmarks.gpu.setting import Record, Setting, attempt
from benchmarks.timing import ratios, spread
from lit_adapters.ops import rational, set_rational_backend

DTYPES = ("float32", "bfloat16", "float16")
COPIES = {"forward": 1.0, "forward and backward": 2.5}  # bytes that have to be moved, over those of a copy
GELUS = ("eager GELU", "compiled GELU")

Function = Callable[[Tensor], Tensor]


def speed(setting: Setting) -> Iterator[Record]:
    """One record for each dtype, pass and variant; or the error of a variant that does not run."""
    set_rational_backend("triton")
    for dtype in DTYPES:
        torch.manual_seed(0)
        shape = setting.choose((64, 1024, 3072), (1, 2, 48))
        x, grad, copy = (torch.randn(shape, device=setting.device).to(getattr(torch, dtype)) for _ in range(3))
        torch.compiler.reset()  # or the second dtype would be compiled for any
        functions, left_out = variants(setting, x)
        yield from ({"dtype": dtype, **record} for record in left_out)
        for step, copies in COPIES.items():
            calls = {name: call_of(step, *of, x, grad) for name, of in functions.items()}
            rounds, repeats = setting.choose((15, 10), (2, 1))
            times = setting.in_turns(calls | {"copy": partial(copy.copy_, x)}, rounds, repeats)
            gelu = min(GELUS, key=lambda name: spread(times[name])["median"])
            bound = [copies * seconds for seconds in times["copy"]]
            for name in functions:
                yield {
                    "dtype": dtype,
                    "shape": list(shape),
                    "pass": step,
                    "variant": name,
                    "seconds": spread(times[name]),
                    "gelu": gelu,
                    "over_gelu": ratios(times, name, gelu),
                    "over_bound": ratios({name: times[name], "bound": bound}, name, "bound"),
                    "copied_bytes_a_second": 2 * x.nbytes / spread(times["copy"])["median"],
                    "rounds": rounds,
                }


def variants(setting: Setting, x: Tensor) -> tuple[dict[str, tuple[Function, list[Tensor]]], list[Record]]:
    """Each function with what it learns; and what does not run, and why."""
    channels = x.shape[-1]
    wide, narrow, of_abs = (
        [c.requires_grad_() for c in coefficients(form, groups, setting.device)]
        for form, groups in (("abs-of-sum", 8), ("abs-of-sum", channels // 24), ("sum-of-abs", 8))
    )
    start = (wide[0].detach().clone(), wide[1].detach().clone())
    functions: dict[str, tuple[Function, list[Tensor]]] = {
        "eager GELU": (F.gelu, []),
        "compiled GELU": (torch.compile(F.gelu), []),
        "rational": (lambda t: rational(t, *wide), wide),
        "without coefficient gradients": (lambda t: rational(t, *start), []),
        "groups of 24 channels": (lambda t: rational(t, *narrow), narrow),
        "anchored": (lambda t: rational(t, *wide, base=start), wide),
        "sum-of-abs": (lambda t: rational(t, *of_abs, "sum-of-abs"), of_abs),
    }
    left_out: list[Record] = []
    if importlib.util.find_spec("rational_kat") is None:
        left_out.append({"variant": "FlashKAT", "left_out": "its package rational_kat is not installed"})
    elif x.dtype == torch.float32:
        functions["FlashKAT"] = (lambda t: flashkat()(t, *of_abs), of_abs)
    for name, of in list(functions.items()):
        if name not in GELUS:
            found = attempt({"variant": name}, lambda of=of: first_call(of, x))
            if "error" in found:
                del functions[name]
                left_out.append(found)
    return functions, left_out


def first_call(of: tuple[Function, list[Tensor]], x: Tensor) -> Record:
    """Run a function both ways once, so that one that fails does not stop the others."""
    for step in COPIES:
        call_of(step, *of, x, torch.ones_like(x))()
    return {}


def call_of(step: str, function: Function, learned: list[Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """A closure of one pass."""
    if step == "forward":
        return torch.no_grad()(lambda: function(x))

    def both() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), [leaf, *learned], grad)

    return both


def flashkat() -> Callable[..., Tensor]:
    """FlashKAT's function of x (B, L, D), numerator (G, 6) and denominator (G, 4), from its repository's package."""
    from rational_kat.kernels.flash_rational_triton import FlashRationalTriton1DGroup

    return FlashRationalTriton1DGroup.apply
