"""Seconds and bytes of functions compared in one process: turns, medians of ratios, what is saved for backward."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lit_adapters.training.rank_allocation import RankAllocation


def peak_memory_mib(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of each function's first call, and of a call in each of `rounds` turns (means of `calls`).

    Machines drift, and a function finds the memory as the one before leaves it: the functions take turns, in a random
    order and in the next round in its opposite, and one more call of each that is not counted comes first.

    Raises:
        SystemExit: There are fewer than two rounds, which have no quartiles.
    """
    if rounds < 2:
        raise SystemExit(f"error: {rounds} rounds have no quartiles; take at least 2")
    first = {name: timed(function) for name, function in functions.items()}
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    draw = random.Random(0)
    order = list(functions)
    for number in tqdm(range(rounds), desc="rounds"):
        order.reverse()
        if number % 2 == 0:
            draw.shuffle(order)
        for name in order:
            times[name].append(timed(lambda f=functions[name]: [f() for _ in range(calls)]) / calls)
    return first, times


@dataclass(frozen=True)
class TrainingStep:
    """Takes one training step when called.

    Attributes:
        loss: Computes the loss of a batch.
        optimizer: Trains what is trainable.
        allocation: Penalties and ranks of the adapters, for methods that have them.
    """

    loss: Callable[[], Tensor]
    optimizer: Optimizer
    allocation: RankAllocation | None = None
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __call__(self) -> None:
        self.loss().backward()
        if self.allocation:
            self.allocation.add_orthogonality()
        self.optimizer.step()
        if self.allocation:
            self.allocation.update(next(self._number))
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of the tensors that the optimiser keeps; 0 before the first step."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> TrainingStep:
    """One step of AdamW on what is trainable."""
    return TrainingStep(loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Resident(NamedTuple):
    """Memory of a process that takes three steps, in MiB."""

    peak: int
    needed: int  # of it, beyond what was resident before them


def resident_of(make_step: Callable[..., Callable[[], None]], *arguments: Any) -> Resident:
    """What three steps of a closure need, the C library's fragments included, in a process of their own."""
    resident: Resident = alone(_resident_of, make_step, arguments)
    return resident


def _resident_of(make_step: Callable[..., Callable[[], None]], arguments: tuple[Any, ...]) -> Resident:
    step = make_step(*arguments)
    peak_memory_mib(reset=True)
    before = peak_memory_mib()
    for _ in range(3):
        step()
    peak = peak_memory_mib()
    return Resident(round(peak), round(peak - before))


def allocated_mib(step: Callable[[], object]) -> float:
    """The most that tensors take at a time in the first two steps, beyond what there was before.

    The first makes what stays: the optimiser's state, and copies that adapters keep.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    counts = [e["args"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
    before = counts[0]["Total Allocated"] - counts[0]["Bytes"]
    largest: int = max(count["Total Allocated"] for count in counts)
    return (largest - before) / 2**20


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartiles": [low, high]}


def ratios(times: Mapping[str, list[float]], name: str, other: str) -> dict[str, Any]:
    """Median and quartiles of one function's time over another's in the same round."""
    return spread([a / b for a, b in zip(times[name], times[other], strict=True)])


def other_load() -> float:
    """Processes that waited or ran over the last minute, this one included; above its threads, others were at work."""
    return os.getloadavg()[0]


def saved_for_backward(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of what autograd keeps in a call of `function`, parameters apart: of all storages, and of the largest."""
    storages: dict[int, int] = {}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # an operator that held its own output would never be freed
        # Views of parameters too, as the transposed weight that a linear layer keeps, are no copies.
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            storages[alone.untyped_storage().data_ptr()] = alone.untyped_storage().nbytes()
            kept.append(alone)  # or its memory would be used again
        return alone

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return sum(storages.values()), max(storages.values(), default=0)
