"""Layers with several adapters that act together: their changes add up, or each row of a batch has its own.

These modules stand in the places of adapters while several are in use. The adapters themselves are outside the module
tree then, and do not train.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.hooks import copy_hooks, move_hooks
from lit_adapters.methods.matrix_layers import is_quantised
from lit_adapters.methods.quantised import foreign_quantisation


class Together(AdapterModule):
    """One layer with several adapters.

    Args:
        parts: The adapters of this layer, by the names of their sets.
    """

    parts: dict[str, AdapterModule]
    _trained: list[nn.Parameter]  # of the parts, before they came here

    def __init__(self, parts: dict[str, AdapterModule]) -> None:
        first = next(iter(parts.values()))
        original = first.pretrained()
        # As in ActivationAdapter: several layers may share one activation object.
        super().__init__(copy.copy(original) if first.base is not original else original, first.qualified_name)
        self.__dict__["parts"] = parts
        self.__dict__["original"] = original
        # They do not train here, even if an optimiser has them.
        parameters = [p for part in parts.values() for p in part.adapter_parameters().values()]
        self.__dict__["_trained"] = [p for p in parameters if p.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        self.train(self.training)
        if self.base is not original:
            copy_hooks(original, self)
            copy_hooks(nn.Module(), self.base)
            if getattr(original, "inplace", False):  # it would overwrite the input of the parts
                self.base.inplace = False

    def pretrained(self) -> nn.Module:
        original: nn.Module = self.__dict__["original"]
        return original

    def take_out(self) -> nn.Module:
        """As for any adapter; the adapters train again."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        original = self.pretrained()
        if self.base is original:
            return super().take_out()
        move_hooks(self, original)
        return original

    def train(self, mode: bool = True) -> Together:
        """Set the mode of the base; the adapters stay in eval mode, without dropout."""
        for part in self.parts.values():
            part.training = False
            part.clear_caches()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Together:
        super()._apply(fn, recurse)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for part in self.parts.values():
            part.rejoin(device or fn(next(iter(part.adapter_tensors().values()))).device)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        """As for any module.

        Raises:
            AdapterError: Always, as a state dict would lack the adapters.
        """
        raise AdapterError(
            f"a state dict would lack the adapters {', '.join(map(repr, self.parts))}, which are in use together; "
            "save each with lit_adapters.save_adapters(model, directory, name=...)"
        )


class AdapterSum(Together):
    """y = y0 + sum_i (y_i - y0): y0 is the pretrained layer's output, y_i that of its i-th adapter.

    For updates of a weight this is (W0 + sum_i dW_i) x + bias, for learned functions act(x) + sum_i (phi_i(x) -
    act(x)). Of experts the weights are added, W_e + sum_i dW_e,i, as y is not linear in them. The sum is computed in
    float32; each y_i has the dtype of the layer.
    """

    method = "sum"

    def __init__(self, parts: dict[str, AdapterModule]) -> None:
        super().__init__(parts)
        if all(part.merges_into for part in parts.values()):
            self.merges_into = sorted({name for part in parts.values() for name in part.merges_into})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(*args, **kwargs)
        if any(isinstance(part, ExpertsAdapter) for part in self.parts.values()):  # y is not linear in their weights
            dtypes = {name: self.base._parameters[name].dtype for name in self.merges_into}
            wide = torch.promote_types(next(iter(dtypes.values())), torch.float32)
            total = {name: value.to(dtypes[name]) for name, value in self.merged_parameters(wide).items()}
            return self.call_base_with(total, args, kwargs)
        y0 = self.base(*args, **kwargs)
        wide = y0.to(torch.promote_types(y0.dtype, torch.float32))
        y = wide
        for part in self.parts.values():
            y = y + (part.branch(*args, **kwargs) if part.has_branch else part(*args, **kwargs) - wide)
        return y.to(y0.dtype)

    @property
    def weight(self) -> Any:
        """The pretrained parameter; W0 + sum_i dW_i where the parent reads it and does not call the layer."""
        raw = self.base._parameters["weight"]
        if not self.read_as_weight or not self.enabled or raw is None:
            return raw
        if self.on_read is not None:
            self.on_read()
        return self.merged_parameters(torch.promote_types(raw.dtype, torch.float32))["weight"].to(raw.dtype)

    def check_mergeable(self) -> None:
        """As for every adapter.

        Raises:
            AdapterError: One of the adapters cannot be merged, or the base is quantised.
        """
        for part in self.parts.values():
            part.check_mergeable()
        if is_quantised(self.base) or foreign_quantisation(self.base):
            raise AdapterError(
                f"{self.qualified_name!r} is quantised, so that a sum of adapters cannot be merged into it; make one "
                "of them with lit_adapters.combine, and merge that"
            )

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """P0 + sum_i (P_i - P0) for each parameter P that one of the adapters changes."""
        total: dict[str, Tensor] = {}
        for part in self.parts.values():
            for name, value in part.merged_parameters(dtype).items():
                before = self.base._parameters.get(name)
                start = torch.zeros_like(value) if before is None else before.to(dtype)
                total[name] = total.get(name, start) + (value - start)
        return total


class RowAdapters(Together):
    """One layer in which each row of a batch has the adapter of its own name; (rows, ...) -> (rows, ...).

    Args:
        parts: The adapters of this layer, by the names of their sets.
        names: The name for each row of the batch; None, or a name without an adapter here, for the pretrained layer.
    """

    method = "rows"

    def __init__(self, parts: dict[str, AdapterModule], names: Sequence[str | None]) -> None:
        super().__init__(parts)
        chosen = [name if name in parts else None for name in names]
        self._groups = [
            (name, torch.tensor([i for i, n in enumerate(chosen) if n == name])) for name in dict.fromkeys(chosen)
        ]
        self._back = torch.argsort(torch.cat([rows for _, rows in self._groups]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(*args, **kwargs)
        first = "" if args else next(iter(kwargs))
        x = args[0] if args else kwargs[first]
        if x.shape[0] != len(self._back):
            raise AdapterError(
                f"{self.qualified_name!r} got an input {tuple(x.shape)} for {len(self._back)} rows with adapters of "
                "their own; its first dimension must be the rows (with beams, give a name for each beam)"
            )
        if len(self._groups) == 1:
            return self._layer(self._groups[0][0])(*args, **kwargs)
        if all(name is None or self.parts[name].has_branch for name, _ in self._groups):
            y = self.base(x)  # of all rows at once
            for name, rows in self._groups:
                if name is not None:
                    here = rows.to(x.device)
                    y = y.index_add(0, here, self.parts[name].branch(x.index_select(0, here)).to(y.dtype))
            return y
        outputs = []
        for name, rows in self._groups:
            part = x.index_select(0, rows.to(x.device))
            layer = self._layer(name)
            outputs.append(layer(part, *args[1:], **kwargs) if args else layer(**kwargs | {first: part}))
        return torch.cat(outputs).index_select(0, self._back.to(x.device))

    def _layer(self, name: str | None) -> nn.Module:
        layer: nn.Module = self.base if name is None else self.parts[name]
        return layer
