"""What a training step takes of each device where several share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_adapters.training.hardware import Device
from lit_adapters.training.step_cost import GRADIENTS, STATES, TRAINED, WEIGHTS, StepCost

Strategy = Literal["ddp", "fsdp"]
BUCKETS, GATHERED = "buckets of gradients", "gathered blocks"


@dataclass(frozen=True)
class Placement:
    """A step over several devices, each with a batch of its own.

    Attributes:
        parts: Bytes of a device at the peak, by part.
        sent: Bytes that a device sends in a step.
    """

    parts: dict[str, float]
    sent: float

    @property
    def peak(self) -> float:
        """Bytes of a device at the peak."""
        return sum(self.parts.values())

    def seconds_between(self, device: Device) -> float:
        """Seconds in which a device sends what it has to; a part of it beside the arithmetic."""
        return self.sent / device.link


def place(cost: StepCost, devices: int, strategy: Strategy) -> Placement:
    """Share a step between devices.

    With DDP each holds everything, and the gradients once more in buckets, which a ring adds up. With FSDP2 each holds
    its share of parameters, gradients and states, and two whole blocks at a time; parameters are gathered in the
    forward pass and again in the backward pass.

    Args:
        cost: The step of one device.
        devices: How many there are.
        strategy: How they share.
    """
    parts: dict[str, float] = dict(cost.parts)
    trained = parts.get(TRAINED, 0.0)
    around = (devices - 1) / devices  # of a tensor, what a device sends to let all have the whole
    if devices == 1:
        return Placement(parts, 0.0)
    if strategy == "ddp":
        return Placement({**parts, BUCKETS: trained}, 2 * around * trained)
    whole = parts.get(WEIGHTS, 0.0) + trained
    for part in (WEIGHTS, TRAINED, GRADIENTS, STATES):
        parts[part] = parts.get(part, 0.0) / devices
    return Placement({**parts, GATHERED: 2.0 * cost.largest_block}, around * (2 * whole + trained))
