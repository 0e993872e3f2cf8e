"""How long does the rational function take, forward and backward, beside GELU?

    python -m benchmarks.rational_speed [--rounds 15] [--threads 2] [--device cuda]

GELU is bound by memory: reading x and writing y, then reading x and dy and writing dx; so is a good rational function.
Every variant takes turns with eager and compiled GELU in one process, and is compared with the one whose median is
lower: on some processors that is the eager one. "blocks" is the path without a C++ compiler; "eager formula" is the
reference in the dtype of x, which keeps a dozen tensors. bfloat16 needs a processor that has it to mean anything.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, other_load, ratios, spread
from lit_adapters.activations import fit_for
from lit_adapters.ops import rational, rational_reference, set_rational_backend
from lit_adapters.ops.rational import Backend

GELUS = ("eager GELU", "compiled GELU")
SHAPES = {"float32": (64, 197, 768), "bfloat16": (4, 512, 1536)}


def variants(x: Tensor, grad: Tensor) -> dict[str, Callable[[], None]]:
    """Forward and backward of GELU and of each way to compute the rational function."""
    fit = fit_for(torch.nn.GELU(), (-6.0, 6.0), (5, 4), "abs-of-sum")
    compiled = torch.compile(F.gelu)

    def coefficients(groups: int, trained: bool = True) -> list[Tensor]:
        rows = (fit.numerator, fit.denominator)
        return [torch.tensor(c).float().repeat(groups, 1).to(x.device).requires_grad_(trained) for c in rows]

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            leaf = x.detach().requires_grad_()
            function(leaf).backward(grad)
            if x.is_cuda:
                torch.cuda.synchronize()

        return call

    def on(backend: Backend, function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        call = both(function)

        def chosen() -> None:
            set_rational_backend(backend)
            call()

        return chosen

    learned, fixed, narrow = coefficients(8), coefficients(8, False), coefficients(x.shape[-1] // 24)
    start = [c.detach() for c in learned]
    return {
        "eager GELU": both(F.gelu),
        "compiled GELU": both(compiled),
        "rational": on("auto", lambda t: rational(t, *learned)),
        "without coefficient gradients": on("auto", lambda t: rational(t, *fixed)),
        "groups of 24 channels": on("auto", lambda t: rational(t, *narrow)),
        "anchored": on("auto", lambda t: rational(t, *learned, base=(start[0], start[1]))),
        "blocks": on("blocks", lambda t: rational(t, *learned)),
        "eager formula": both(lambda t: rational_reference(t, *(c.to(t.dtype) for c in learned))),
    }


def faster_gelu(times: Mapping[str, list[float]]) -> str:
    """The GELU whose median is lower."""
    return min(GELUS, key=lambda name: statistics.median(times[name]))


def main() -> None:
    """Measure both shapes and append to results/rational_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.dtypes:
        torch.manual_seed(0)
        x, grad = (torch.randn(SHAPES[name]).to(args.device, getattr(torch, name)) for _ in range(2))
        first, times = alternate(variants(x, grad), args.rounds)
        faster = faster_gelu(times)
        for variant, seconds in times.items():
            record = {
                "device": args.device,
                "dtype": name,
                "shape": SHAPES[name],
                "variant": variant,
                "seconds": spread(seconds),
                "over_gelu": ratios(times, variant, faster),
                "faster": faster,
                "first_call_seconds": first[variant],
                "rounds": args.rounds,
                "system_load": other_load(),
                "environment": environment(),
            }
            append(RESULTS / "rational_speed.json", record)
            print(f"{name} {variant:<32} {record['over_gelu']['median']:.2f} of {faster}'s time", flush=True)


if __name__ == "__main__":
    main()
