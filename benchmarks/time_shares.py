"""Where does the time of a training step go, ours beside peft's? The steps of benchmarks/against_peft.py, profiled.

    python -m benchmarks.time_shares [--models vit llama layer] [--methods lora dora] [--precisions bf16 fp32]
                                    [--steps 5]

Milliseconds a step of PyTorch's operators by kind, from torch.profiler on one thread, where no operator waits for
another; "Python" is what is left of the time by the clock: Python, autograd, and the profiler's own work. A product is
thin if one of its sizes is the rank.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import trange

from benchmarks.against_peft import METHODS, TARGETS, step_of
from benchmarks.performance_tables import KINDS
from benchmarks.results_file import RESULTS, append, environment, measurable
from benchmarks.timing import other_load, timed

RANK = 8
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear", "linear", "matmul")
COPIES = ("_to_copy", "to", "copy_", "clone", "contiguous", "cat")


def kind_of(event: Any) -> str:
    """What an operator, an event of the profiler, does."""
    within = event
    while within is not None:
        if within.name.startswith("Optimizer."):
            return "AdamW"
        within = within.cpu_parent
    if not event.name.startswith("aten::"):
        return "Python"  # and autograd's bookkeeping
    operator = event.name.removeprefix("aten::")
    if "attention" in operator:
        return "attention"
    if "convolution" in operator:
        return "wide products"
    if operator in PRODUCTS:
        thin = any(RANK in shape[-2:] for shape in event.input_shapes if shape)
        return "thin products" if thin else "wide products"
    return "copies and casts" if operator in COPIES else "all else"


def shares(name: str, library: str, method: str, precision: str, steps: int) -> dict[str, float]:
    """Milliseconds a step by kind, of the fastest step: the first ones wait for memory, which comes page by page."""
    step = step_of(name, library, method, RANK, precision, False)
    for _ in range(2):
        step()
    profiled: list[tuple[float, Counter[str]]] = []
    for _ in trange(steps, desc=f"{name} {library} {method} {precision}"):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:  # events take much memory
            seconds = timed(step)
        own: Counter[str] = Counter()
        for event in profiler.events():
            own[kind_of(event)] += event.self_cpu_time_total / 1e3
        own["Python"] += 1e3 * seconds - own.total()
        profiled.append((seconds, own))
    _, fastest = min(profiled, key=lambda of: of[0])
    return {kind: round(fastest[kind], 2) for kind in KINDS}


def main() -> None:
    """Measure and append to results/time_shares.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    torch.set_num_threads(1)
    for model, method, precision in itertools.product(args.models, args.methods, measurable(args.precisions)):
        record: dict[str, Any] = {"model": model, "method": method, "precision": precision, "rank": RANK}
        for library in ("ours", "peft"):
            record[library] = shares(model, library, method, precision, args.steps)
            print(model, method, precision, library, record[library], flush=True)
        record |= {"steps": args.steps, "system_load": other_load(), "environment": environment()}
        append(RESULTS / "time_shares.json", record)


if __name__ == "__main__":
    main()
