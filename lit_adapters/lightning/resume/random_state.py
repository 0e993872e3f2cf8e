"""The global random states of this process, as plain values that a checkpoint may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """States of torch (the CPU, and `device` if it is a GPU), numpy and Python; loadable under weights_only."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    key, position = torch.from_numpy(numpy["state"]["key"].astype(np.int64)), int(numpy["state"]["pos"])
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {"key": key, "pos": position, "has_gauss": int(numpy["has_gauss"]), "gauss": float(numpy["gauss"])},
        "python": {"version": version, "state": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Take up what `random_states` returned; a GPU's state is left alone where there is no GPU now, or was none."""
    torch.set_rng_state(states["torch"].cpu())
    numpy, python = states["numpy"], states["python"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].cpu().numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
