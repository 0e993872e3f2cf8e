"""A call on few rows, as for each token in generation, with all that it needs in one place.

There the products are so small that the questions around them take longer: which path, which dtype, whether something
was merged, hooked or replaced. The answers are found once; a call compares what they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.ops._context import autocast_dtype, transformed
from lit_adapters.ops.low_rank import low_rank_linear_of_few

FEW_ROWS = 8


def is_short(x: Tensor, weight: Tensor) -> bool:
    """Whether x has few rows, no gradients are recorded and nothing is cast; never in a dispatch mode.

    There, a tensor may represent another one, and what is computed from it must not be kept.
    """
    if torch._C._len_torch_dispatch_stack() or x.is_meta:
        return False
    if torch.is_grad_enabled() or x.dtype != weight.dtype or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    return autocast_dtype(x) is None


class ShortCall:
    """h = x W^T + bias + s (x A^T) B^T, then h + g (h - bias) with a gain less 1, for few rows and without gradients.

    A copy or a pickle of it is None, as it would hold the tensors of another module.

    Args:
        adapter: The adapter; in eval mode, and in effect.
        weight: W (out, in), in the dtype of x.
        pair: A (r, in) and B (out, r) in that dtype; None leaves the product out. s is the adapter's `scaling`.
        gain: g (out,) in that dtype, or None.

    Attributes:
        can_be_kept: Whether every change of a tensor will be seen.
    """

    __slots__ = (
        "bias",
        "can_be_kept",
        "device",
        "dtype",
        "gain",
        "hooks",
        "most",
        "named",
        "pair",
        "state",
        "state_of_base",
        "weight",
        "written",
    )

    def __init__(
        self,
        adapter: Any,
        weight: Tensor,
        pair: tuple[Tensor, Tensor] | None = None,
        gain: Tensor | None = None,
    ) -> None:
        base: nn.Module = adapter.base
        self.weight, self.bias, self.pair, self.gain = weight, base._parameters.get("bias"), pair, gain
        self.most, self.dtype, self.device = FEW_ROWS * weight.shape[1], weight.dtype, weight.device.type
        self.state, self.state_of_base = adapter.__dict__, base.__dict__
        self.hooks = base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks
        tables: list[Mapping[str, Tensor | None]] = [base._parameters]
        if adapter._parameters is not base._parameters:
            tables.append(adapter._parameters)
        tables.append(adapter._buffers)
        self.named = [(table, name, t) for table in tables for name, t in table.items()]
        tensors = [t for _, _, t in self.named if t is not None]
        # PyTorch does not count writes to inference tensors.
        self.can_be_kept = not any(t.is_inference() for t in tensors)
        # Tensors that the products read directly may change freely; if anything was derived (a cast, a gain, a formed
        # weight), every tensor is watched, and buffers such as beta always.
        used = [weight, *(pair or ())]
        is_plain = gain is None and all(any(u is t for t in tensors) for u in used)
        written = [t for t in adapter._buffers.values() if t is not None] if is_plain else tensors
        self.written = [(t, t._version, t.data_ptr()) for t in written] if self.can_be_kept else []

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output (..., out) for x (..., in); None where the general way must be taken."""
        state = self.state
        if (
            torch.is_grad_enabled()
            or transformed()
            or x.numel() > self.most
            or x.dtype != self.dtype
            or torch.is_autocast_enabled(self.device)
            or torch._C._len_torch_dispatch_stack()  # a tensor may represent another one
            or state["training"]
            or not state["enabled"]
            or state["_merged_names"]
            or state["_original"] is not None
            or any(self.hooks)
            or "forward" in self.state_of_base
        ):
            return None
        for table, name, tensor in self.named:
            if table.get(name) is not tensor:
                return None
        for tensor, version, address in self.written:
            if tensor._version != version or tensor.data_ptr() != address:
                return None
        if self.pair is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = low_rank_linear_of_few(x, self.weight, self.bias, *self.pair, state["scaling"])
        if self.gain is not None:
            y.addcmul_(y if self.bias is None else y - self.bias, self.gain)
        return y

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
