"""Tiny networks quantised to 4 bit by bitsandbytes, and what their weights stand for."""

import pytest
import torch
from torch import Tensor, nn

import lit_adapters as la

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

METHODS = {
    "lora": la.LoRA(rank=4, alpha=8.0),
    "dora": la.DoRA(rank=4, alpha=8.0),
    "afa": la.AFALoRA(rank=4, alpha=8.0, activation="silu"),
    "loran": la.LoRAN(rank=4, alpha=8.0, amplitude=0.5, frequency=20.0),
    "vera": la.VeRA(rank=4),
    "lora2": la.LoRA2(width=4, rank=4, alpha=4.0e3),  # a product of five small factors
}
WIDE, HALF = torch.float32, torch.bfloat16
every_method = pytest.mark.parametrize("method", METHODS)
nesting = pytest.mark.parametrize("nested", [False, True], ids=["plain-scales", "double-quantised"])


def layer(size=(128, 64), nested=True, stored=WIDE, compute=WIDE, storage=torch.uint8) -> nn.Module:
    """A Linear4bit (in, out) whose weight had the dtype `stored` before, and which multiplies in `compute`."""
    linear = bnb.nn.Linear4bit(
        *size, compute_dtype=compute, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    return linear.to(stored).to("cpu")


def network(**settings) -> nn.Sequential:
    return nn.Sequential(layer((128, 64), **settings), nn.GELU(), layer((64, 96), **settings))


def move(model: nn.Module) -> nn.Module:
    """All that trains off its start, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def adapted(method: str, **settings) -> nn.Sequential:
    model = network(**settings)
    la.attach(model, METHODS[method])
    return move(model)


def dequantised(weight: Tensor) -> Tensor:
    """What a packed weight stands for, float64, by definition: entries of the table times the scales of the blocks."""
    state = weight.quant_state
    scales = state.absmax.double()
    if state.nested:
        second = state.state2
        scales = (
            second.code.double()[state.absmax.long()] * second.absmax.double().repeat_interleave(256)[: len(scales)]
        )
        scales = scales + state.offset.double()
    packed = weight.detach().view(torch.uint8).flatten()
    entries = state.code.double()[torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
    return (entries * scales.repeat_interleave(state.blocksize)).view(state.shape)


def content(weight: Tensor) -> Tensor:
    """A copy of the bytes of a packed weight."""
    return weight.detach().view(torch.uint8).clone()


def error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact| / max |exact|."""
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def inputs(dtype: torch.dtype = WIDE) -> Tensor:
    return torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
