"""A layer of the peft library in the form of our adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.allocation import RANK_CHARTS, Allocated
from lit_adapters.methods.description import AdapterSummary
from lit_adapters.ops._context import autocast_dtype


class PeftAdapter(Allocated, AdapterModule):
    """One layer of peft, called the tuner, around its base layer.

    The tuner itself is not in the module tree; its children are, beside the base's keys. A child that several adapters
    share, such as the projections of VeRA, belongs to the first of them only. Tensors that the tuner does not train are
    buffers.

    Attributes:
        tuner: The layer of peft.
    """

    method = "peft"
    tuner: Any

    def __init__(self, tuner: Any, qualified_name: str, owned: set[int]) -> None:
        super().__init__(tuner.base_layer, qualified_name)
        self.__dict__["tuner"] = tuner
        self._tuner_children: list[str] = []
        self.merges_into = [n for n in self._base_parameters if self._parameters[n] is not None]
        _register(tuner)
        for name, parameter in tuner._parameters.items():
            add = self.add_parameter if parameter.requires_grad else self.add_buffer
            add(name, parameter.detach())
        for name, buffer in tuner._buffers.items():
            self.add_buffer(name, buffer, persistent=name not in tuner._non_persistent_buffers_set)
        tuner._parameters, tuner._buffers = self._parameters, self._buffers
        for name, child in tuner._modules.items():
            tensors = {id(t) for t in (*child.parameters(), *child.buffers())}
            if name == "base_layer" or (tensors and tensors <= owned):
                continue
            _settle(child)
            owned |= {id(t) for t in (*child.parameters(), *child.buffers())}
            self._modules[name] = child
            self._tuner_children.append(name)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        children = ((name, self._modules[name]) for name in self._tuner_children)
        nested = {f"{name}.{key}": p for name, child in children for key, p in child.named_parameters()}  # type: ignore[union-attr]
        return super().adapter_parameters() | nested

    def adapter_tensors(self) -> dict[str, Tensor]:
        children = ((name, self._modules[name]) for name in self._tuner_children)
        nested = {f"{name}.{k}": t for name, child in children for k, t in child.state_dict(keep_vars=True).items()}  # type: ignore[union-attr]
        return super().adapter_tensors() | nested

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(*args, **kwargs)
        if self.tuner.training != self.training:  # `train()` does not reach it, as it is not in the tree
            self.tuner.training = self.training
        y = self.tuner(*args, **kwargs)
        weight = self._parameters.get("weight")
        if weight is None or not isinstance(y, Tensor) or autocast_dtype(y) is not None:
            return y
        # A layer in half precision returns half precision, although the adapter computes in float32.
        widened = y.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
        return y.to(weight.dtype) if widened else y

    # ---- AdaLoRA, dW = s B diag(E) A

    def direction_values(self) -> Tensor | None:
        """E, if AdaLoRA's ranks are allocated."""
        return self.adapter_parameters().get("lora_E.default") if self.allocation is not None else None

    def orthogonal_factors(self) -> list[tuple[nn.Parameter, bool]]:
        """A by its rows and B by its columns."""
        if self.direction_values() is None:
            return []
        parameters = self.adapter_parameters()
        return [(parameters["lora_A.default"], True), (parameters["lora_B.default"], False)]

    def statistics(self) -> dict[str, float]:
        """rank: The number of AdaLoRA's directions that are kept."""
        return self.rank_statistic()

    def summary(self) -> AdapterSummary:
        """As for any method, with the rank that was allocated."""
        return self.with_rank(super().summary())

    def charts(self) -> dict[str, str]:
        """The ranks of AdaLoRA."""
        return {} if self.direction_values() is None else RANK_CHARTS

    # ---- merging

    def check_mergeable(self) -> None:
        """As for every adapter.

        Raises:
            AdapterError: As for every adapter, or peft cannot merge this method.
        """
        super().check_mergeable()
        self.merged_parameters(torch.float32)

    @torch.no_grad()
    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The base's parameters after peft's own merge in `dtype`, which runs on a copy.

        Raises:
            AdapterError: Peft cannot merge this method.
        """
        try:
            tuner = copy.deepcopy(self.tuner).to(dtype)
            tuner.merge(safe_merge=True)
        except Exception as error:  # methods of peft raise many kinds
            kind = type(self.tuner).__module__.split(".")[2]
            raise AdapterError(f"peft cannot merge {self.qualified_name!r} ({kind}): {error!r}; keep it") from error
        base = tuner.get_base_layer()
        return {name: base._parameters[name].detach() for name in self.merges_into}

    def _own_tables(self, base: nn.Module) -> nn.Module:
        base = super()._own_tables(base)
        for name in self._tuner_children:
            del base._modules[name]
        return base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PeftAdapter:
        """Move the adapter; buffers that no file holds keep their dtype as well."""
        derived = {id(b) for name in self._tuner_children for b in self._modules[name].buffers()}  # type: ignore[union-attr]

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in derived or tensor.is_meta else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


def _register(tuner: Any) -> None:
    """Register modules and tensors that peft keeps in plain attributes, so that they move and are saved."""
    from peft.tuners._buffer_dict import BufferDict

    for name, value in list(vars(tuner).items()):
        if isinstance(value, nn.Module):
            setattr(tuner, name, value)
        elif (
            isinstance(value, dict) and not name.startswith("_") and any(isinstance(v, Tensor) for v in value.values())
        ):
            setattr(tuner, name, BufferDict(value, persistent=True))


def _settle(child: nn.Module) -> None:
    """Cast floating-point tensors to float32, and make buffers of parameters that do not train."""
    for module in child.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
            if not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.data)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
