"""A warning for adapters that should be nonlinear and are linear at the size that their updates have reached."""

from __future__ import annotations

import math

from torch import nn

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.sharding import gathered
from lit_adapters.training.attached import adapter_layers

_SHARE = 0.2  # of the training; by then the rate has warmed up, and updates are of the size they will have
_LEAST_STEPS = 10  # before these, updates are of no size yet; a shorter training is not looked at
_STEPS = 100  # where the length of the training is not known


def step_to_look_at(total_steps: float) -> int:
    """The optimiser step after which `linear_layers` tells something, for a training of `total_steps`."""
    known = math.isfinite(total_steps) and total_steps > 0
    return max(_LEAST_STEPS, math.ceil(_SHARE * total_steps)) if known else _STEPS


def linear_layers(model: nn.Module) -> str:
    """Which adapters are linear though their method is not, and what to do; empty if none is.

    Every process of a sharded model calls this, under the autocast of the training.
    """
    layers = {
        name: adapter
        for name, adapter in adapter_layers(model).items()
        if type(adapter).nearly_linear is not AdapterModule.nearly_linear
    }
    reasons: dict[str, str] = {}
    for name, adapter in layers.items():
        with gathered(adapter):
            reasons[name] = adapter.nearly_linear()
    linear = [name for name, reason in reasons.items() if reason]
    if not linear:
        return ""
    alike = [name for name in layers if layers[name].method == layers[linear[0]].method]
    return (
        f"{len(linear)} of {len(alike)} adapters of the method {layers[linear[0]].method} are linear so far: in "
        f"{linear[0]!r}, {reasons[linear[0]]}. They do what LoRA does. Set frequency='calibrate' (with amplitude 1 for "
        "sinter), or compare with function='identity'"
    )
