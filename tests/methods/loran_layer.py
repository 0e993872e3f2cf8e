"""One linear layer under LoRAN, away from its start."""

import torch
from torch import nn

import lit_adapters as la
from lit_adapters.methods.loran import LoRANAdapter


def layer(base: nn.Module | None = None, **settings) -> LoRANAdapter:
    network = nn.Sequential(nn.Linear(12, 8) if base is None else base)
    la.attach(network, la.LoRAN(**{"rank": 3, "alpha": 6.0, "targets": ["0"]} | settings))
    ((_, adapter),) = la.adapters(network)
    with torch.no_grad():
        adapter.lora_B.normal_()
        adapter.lora_A.normal_()
    return adapter
