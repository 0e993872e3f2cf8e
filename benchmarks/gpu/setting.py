"""Where and how large the questions are measured; time and memory of the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.timing import alternate, peak_memory_mib

Record = dict[str, Any]
T = TypeVar("T")


class Setting(NamedTuple):
    """What all questions of a run share.

    Attributes:
        device: "cuda", or "cpu" to try the script without a GPU.
        size: "full", or "tiny" for shapes so small that they try the script and measure nothing.
    """

    device: str
    size: str

    def choose(self, full: T, tiny: T) -> T:
        """The value for this size."""
        return full if self.size == "full" else tiny

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds of a clock, once the device has done all that it was given."""
        self.wait()
        return time.perf_counter()

    def in_turns(
        self, functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
    ) -> dict[str, list[float]]:
        """Seconds of a call in each of `rounds` turns (means of `calls`), after two turns that are not counted."""

        def turn_of(function: Callable[[], object]) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(calls):
                    function()
                self.wait()

            return turn

        _, times = alternate({name: turn_of(f) for name, f in functions.items()}, rounds)
        return {name: [seconds / calls for seconds in of] for name, of in times.items()}

    def forget_peak(self) -> None:
        """Give unused memory back, and measure the peak anew from here."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak_memory_mib(reset=True)

    def peak(self) -> Record:
        """The most memory of tensors since `forget_peak`, and of the allocator; without a GPU, resident memory."""
        self.wait()
        if self.device == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            return {"allocated_mib": round(allocated / 2**20), "reserved_mib": round(reserved / 2**20)}
        return dict.fromkeys(("allocated_mib", "reserved_mib"), round(peak_memory_mib()))


def attempt(key: Record, measure: Callable[[], Record]) -> Record:
    """What was measured of one thing among several, or its error, so that the others are measured all the same."""
    try:
        return key | measure()
    except Exception as error:
        return key | {"error": f"{type(error).__name__}: {error}"}
