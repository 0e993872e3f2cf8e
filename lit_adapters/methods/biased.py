"""BitFit on a layer whose weight another method adapts: h = W' x + b0 + d, in one adapter.

A layer has one adapter. So where both LoRA (or its kin) and BitFit want a layer, the adapter of the weight takes up d.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.methods.dense_lora import DenseLoRAAdapter
from lit_adapters.methods.description import AdapterSummary
from lit_adapters.methods.dora import DoRAAdapter
from lit_adapters.methods.lora import LoRAAdapter
from lit_adapters.methods.lora2 import LoRA2Adapter
from lit_adapters.methods.loran import LoRANAdapter
from lit_adapters.methods.nested_lora import NestedLoRAAdapter
from lit_adapters.methods.vera import VeRAAdapter
from lit_adapters.methods.weight_adapter import WeightAdapter

BIAS = "delta_bias"  # the parameter d, as in `BitFitAdapter`


class BiasedAdapter(WeightAdapter):
    """The part of an adapter that adds d (out,) to what the adapted layer returns; d starts at zero."""

    merges_into = ("weight", "bias")
    has_branch = False
    delta_bias: Tensor

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.delta_bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)  # W' x + b0; W0 x + b0 if not enabled
        return y + self.layer.per_channel(self.base, self.delta_bias.to(y.dtype)) if self.enabled else y

    @property
    def adds_bias(self) -> bool:
        """Whether the layer has no bias of its own."""
        return self.base.bias is None

    def method_of(self, name: str) -> str:
        return "bitfit" if name == BIAS else super().method_of(name)

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W0 + dW and b0 + d."""
        d = self.delta_bias.to(dtype)
        return super().merged_parameters(dtype) | {"bias": d if self.adds_bias else self.base.bias.to(dtype) + d}

    def merged_dtype(self, name: str) -> torch.dtype:
        """As the layer stores its weight; that of b0 for a bias."""
        return self.base.bias.dtype if name == "bias" and not self.adds_bias else super().merged_dtype(name)

    def absorb_parameter(self, name: str, value: Tensor) -> None:
        if name == "bias":
            AdapterModule.absorb_parameter(self, name, value)
        else:
            super().absorb_parameter(name, value)

    def _bias_change(self) -> float:
        return torch.linalg.vector_norm(self.delta_bias.detach().double()).item()

    def statistics(self) -> dict[str, float]:
        """Those of the weight's method, and bias_change: ||d||."""
        return super().statistics() | {"bias_change": self._bias_change()}

    def summary(self) -> AdapterSummary:
        """That of the weight's method, with the norm of d."""
        summary = super().summary()
        notes = [summary.note] if summary.note else []
        return replace(summary, note=", ".join([*notes, f"bias moved by {self._bias_change():.3g}"]))


class BiasedLoRAAdapter(BiasedAdapter, LoRAAdapter):
    """LoRA and BitFit on one layer."""


class BiasedDoRAAdapter(BiasedAdapter, DoRAAdapter):
    """DoRA and BitFit on one layer."""


class BiasedVeRAAdapter(BiasedAdapter, VeRAAdapter):
    """VeRA and BitFit on one layer."""


class BiasedDenseLoRAAdapter(BiasedAdapter, DenseLoRAAdapter):
    """DenseLoRA and BitFit on one layer."""


class BiasedNestedLoRAAdapter(BiasedAdapter, NestedLoRAAdapter):
    """NestedLoRA and BitFit on one layer."""


class BiasedLoRANAdapter(BiasedAdapter, LoRANAdapter):
    """LoRAN and BitFit on one layer."""


class BiasedLoRA2Adapter(BiasedAdapter, LoRA2Adapter):
    """LoRA^2 and BitFit on one layer."""


class BiasedAFAAdapter(BiasedAdapter, AFAAdapter):
    """AFA-LoRA and BitFit on one layer."""


_BIASED: dict[type[AdapterModule], type[BiasedAdapter]] = {
    LoRAAdapter: BiasedLoRAAdapter,
    DoRAAdapter: BiasedDoRAAdapter,
    VeRAAdapter: BiasedVeRAAdapter,
    DenseLoRAAdapter: BiasedDenseLoRAAdapter,
    NestedLoRAAdapter: BiasedNestedLoRAAdapter,
    LoRANAdapter: BiasedLoRANAdapter,
    LoRA2Adapter: BiasedLoRA2Adapter,
    AFAAdapter: BiasedAFAAdapter,
}


def with_bias(adapter: AdapterModule) -> BiasedAdapter | None:
    """The adapter of a weight with a d of BitFit beside it, or None if it is of no method that can take one up.

    Args:
        adapter: Freshly built; it becomes the result.
    """
    kind = _BIASED.get(type(adapter))
    if kind is None:
        return None
    adapter.__class__ = kind
    assert isinstance(adapter, BiasedAdapter)
    outputs, _ = adapter.layer.size(adapter.base)
    adapter.add_parameter(BIAS, torch.zeros(outputs, device=adapter.base.weight.device))
    return adapter
