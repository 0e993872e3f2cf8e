"""What a training step takes of each device where several share the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_adapters.training.hardware import Device
from lit_adapters.training.step_cost import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    TEMPORARY,
    TRAINED,
    WEIGHTS,
    StepCost,
)

Strategy = Literal["ddp", "fsdp"]
BUCKETS, GATHERED, SENT = "buckets of gradients", "gathered parameters", "gradients on their way"


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


def place(cost: StepCost, devices: int, strategy: Strategy, batches: int = 1) -> Placement:
    """Share a step between devices.

    With DDP each holds everything, and the gradients once more in buckets, which a ring adds up.

    With FSDP2 each holds its share of parameters, gradients and states, two blocks at a time as a whole, what is in no
    block, and all buffers. It holds the gradients of a block twice as a whole: as computed, and in the buffer that is
    sent. For what is in no block the second copy comes last and takes the place of activations. Parameters are gathered
    in the forward pass and again in the backward pass of each batch, after which its gradients are sent.

    Args:
        cost: The step of one device.
        devices: How many there are.
        strategy: How they share.
        batches: Batches of a step.
    """
    parts: dict[str, float] = dict(cost.parts)
    trained = parts.get(TRAINED, 0.0)
    around = (devices - 1) / devices  # of a tensor, what a device sends to let all have the whole
    if devices == 1:
        return Placement(parts, 0.0)
    if strategy == "ddp":
        return Placement({**parts, BUCKETS: trained}, 2 * around * trained)
    whole = parts.get(WEIGHTS, 0.0) - cost.buffers + trained
    for part in (WEIGHTS, TRAINED, GRADIENTS, OPTIMIZER):
        parts[part] = parts.get(part, 0.0) / devices
    parts[WEIGHTS] += around * cost.buffers
    parts[GATHERED] = 2.0 * cost.largest_block + cost.rest
    # The gradients of what is in no block are sent last, when activations are gone.
    passing = sum(parts.get(part, 0.0) for part in (ACTIVATIONS, LOGITS, TEMPORARY))
    parts[SENT] = 2.0 * cost.trained_block + cost.trained_rest + max(0.0, cost.trained_rest - passing)
    return Placement(parts, around * batches * (2 * whole + trained))
