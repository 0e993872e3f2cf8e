"""A configuration for every type of peft that runs, the reason for every other, and a network for all."""

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import lit_adapters as la
from tests.matrix import move

LINEAR = {"target_modules": ["fc1", "fc2"]}
# One configuration for every type that runs.
RUNNING = {
    "LORA": {"r": 2},
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAMSS": {"r": 4},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 8},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 2},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["fc2"]},
    "LILY": {"r": 2},
    "LN_TUNING": {"target_modules": ["norm"]},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "OSF": {},
    "PEANUT": {"r": 2},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed"], "token_indices": [1, 3]},
    "UNILORA": {},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 8},
}
# Why the others do not run.
REFUSED = {
    "ADAPTION_PROMPT": "changes how attention runs",
    "CARTRIDGE": "learns prompts",
    "CPT": "learns prompts",
    "MULTITASK_PROMPT_TUNING": "learns prompts",
    "POLY": "task ids",
    "PREFIX_TUNING": "learns prompts",
    "PROMPT_TUNING": "learns prompts",
    "P_TUNING": "learns prompts",
    "SHADOW": "a second network",
    "XLORA": "routes between saved adapters",
}
NOT_MERGED = {"LILY": "NotImplementedError"}  # its update depends on the input
NO_HALF = {"ADAMSS"}  # casts the input to float32, whatever the layer's weight
NO_PICKLE = {"OSF"}  # keeps local functions as gradient hooks


class Net(nn.Module):
    """One layer of each kind that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.norm = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 32)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.fc2(self.act(self.fc1(self.norm(self.embed(tokens))))))


TOKENS = torch.arange(12).view(2, 6) % 6


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def method(kind: str) -> la.Peft:
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    return la.Peft(PEFT_TYPE_TO_CONFIG_MAPPING[kind](**LINEAR | RUNNING[kind]))


def attached(kind: str) -> Net:
    """A network with the method off its start."""
    model = network()
    la.attach(model, method(kind))
    move(model)
    return model
