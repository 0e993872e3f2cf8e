"""How long a step takes on a device: each operation is bound by arithmetic or by memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.training.step_cost import Example, Operation, step_cost


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        name: What it is called.
        memory: Bytes.
        halves: Most operations a second of matrix products in bfloat16 and float16.
        floats: The same in float32.
        bandwidth: Most bytes of memory that it reads or writes in a second.
        link: Most bytes that it sends to its neighbours in a second; it receives as many at the same time.
        overhead: Seconds that an operation takes at least.
        reach: Share of its bounds that it comes to, in float32 and in a step with halves.
        measured: Whether overhead and reach were measured, so that a time is more than a bound.
    """

    name: str
    memory: float
    halves: float
    floats: float
    bandwidth: float
    link: float
    overhead: float = 0.0
    reach: tuple[float, float] = (1.0, 1.0)
    measured: bool = False

    def seconds(self, operations: Sequence[Operation]) -> float:
        """The time of operations one after the other."""
        bound = sum(max(o.flops / self._rate(o.dtype), o.moved / self.bandwidth) for o in operations)
        halves = any(o.flops and o.dtype.itemsize < 4 for o in operations)
        return bound / self.reach[halves] + self.overhead * len(operations)

    def bounds(self, operations: Sequence[Operation]) -> tuple[float, float]:
        """The time that arithmetic alone would take, and that of memory alone."""
        arithmetic = sum(o.flops / self._rate(o.dtype) for o in operations)
        return arithmetic, sum(o.moved for o in operations) / self.bandwidth

    def _rate(self, dtype: torch.dtype) -> float:
        return self.floats if dtype.itemsize >= 4 else self.halves


# From the makers' data sheets, without sparsity; float32 without TF32. Memory: what CUDA reports. Links: one way of
# NVLink, else PCIe.
_GIB = 2.0**30
DEVICES = {
    "a100-40gb": Device("A100 40 GB", 39.4 * _GIB, 312e12, 19.5e12, 1555e9, 300e9),
    "a100-80gb": Device("A100 80 GB", 79.1 * _GIB, 312e12, 19.5e12, 2039e9, 300e9),
    "h100": Device("H100 SXM", 79.1 * _GIB, 989e12, 67e12, 3350e9, 450e9),
    "h200": Device("H200 SXM", 139.8 * _GIB, 989e12, 67e12, 4800e9, 450e9),
    "l40s": Device("L40S", 44.4 * _GIB, 362e12, 91.6e12, 864e9, 32e9),
    "rtx4090": Device("RTX 4090", 23.6 * _GIB, 165e12, 82.6e12, 1008e9, 32e9),
}


_LINK = 1.25e9  # not measured: a network of 10 gigabits


def this_machine() -> Device:
    """This machine's CPU as it is measured now, in a few seconds.

    Products and copying give the bounds. A step of a small transformer block says how near to them it comes in
    practice, and one of a tiny block what an operation takes at least.
    """
    floats, halves = (_product_rate(dtype) for dtype in (torch.float32, torch.bfloat16))
    block = torch.ones(1 << 26)  # 256 MiB: larger than any cache
    other = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / _fastest(lambda: other.copy_(block))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    device = Device(
        f"this CPU, {torch.get_num_threads()} threads", memory, halves, floats, bandwidth, _LINK, measured=True
    )
    tiny = _Reference(width=32, tokens=8)
    device = replace(device, overhead=tiny.measured(None) / len(tiny.operations(None)))
    usual = _Reference(width=512, tokens=512)
    return replace(device, reach=(usual.reach(device, None), usual.reach(device, torch.bfloat16)))


class _Reference:
    """A training step of a transformer block.

    Args:
        width: Channels.
        tokens: Of a batch, in rows of at most 128.
    """

    def __init__(self, width: int, tokens: int) -> None:
        self.width = width
        self.shape = (max(1, tokens // 128), min(tokens, 128), width)

    def build(self) -> nn.Module:
        return nn.TransformerEncoderLayer(self.width, 8, 4 * self.width, 0.0, F.gelu, batch_first=True, norm_first=True)

    def loss(self, model: nn.Module) -> Tensor:
        output: Tensor = model(torch.ones(self.shape))
        return output.square().mean()

    def operations(self, autocast: torch.dtype | None) -> list[Operation]:
        rows, tokens, width = self.shape
        example = Example(self.build, self.loss, rows, rows * tokens, "tokens", width)
        cost = step_cost(example, self._optimizer, autocast)
        return [*cost.operations, *cost.update]

    def measured(self, autocast: torch.dtype | None) -> float:
        """Seconds of a step."""
        model = self.build()
        optimizer = self._optimizer(model)

        def step() -> None:
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                loss = self.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch.enable_grad():
            return _fastest(step)

    def reach(self, device: Device, autocast: torch.dtype | None) -> float:
        operations = self.operations(autocast)
        fixed = device.overhead * len(operations)
        return (device.seconds(operations) - fixed) / max(self.measured(autocast) - fixed, 1e-9)

    @staticmethod
    def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-9)


def _product_rate(dtype: torch.dtype) -> float:
    rows, inner = 512, 1536  # of a batch and a layer of small models
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, inner, dtype=dtype)
    return 2 * rows * inner * inner / _fastest(lambda: a @ b)


def _fastest(call: Callable[[], object], seconds: float = 0.4) -> float:
    """The shortest time of a call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
