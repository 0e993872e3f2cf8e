"""The base of all adapters that change a weight: W' = W0 + dW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.matrix_layers import matrix_layer
from lit_adapters.ops.cache import Cache


def read_error(name: str, what: str) -> AdapterError:
    """The error where a model reads the weight of a layer whose adapter no weight holds.

    Args:
        name: The layer.
        what: What cannot act then.
    """
    return AdapterError(
        f"the model reads the weight of {name!r} and does not call it, so that no {what} can act; set "
        f"exclude=[{name!r}], or use LoRA, DoRA or LoRAN, which change the weight"
    )


class WeightAdapter(AdapterModule):
    """An adapter whose effect is an update dW (out, in) of the base layer's weight matrix W0 (out, in).

    Subclasses give `delta_weight`, and a `forward` that returns `self.unadapted(x)` unless the adapter is `in_effect`.
    `layer` knows how the base stores its matrix and applies one: see `lit_adapters.methods.matrix_layers`.

    Raises:
        AdapterError: The base holds no weight matrix, or does not multiply by it as a plain layer does.
    """

    merges_into: Sequence[str] = ("weight",)
    needs_weight: ClassVar[bool] = True  # False if the base is only called, so that it may be quantised in any form
    merged_weight: Tensor
    dropout: float = 0.0  # the probability of zeroing an input of the update while training

    def __init__(self, base: nn.Module, qualified_name: str) -> None:
        super().__init__(base, qualified_name)
        self.layer = matrix_layer(base, qualified_name, type(self).__name__.removesuffix("Adapter"), self.needs_weight)
        self._norm: Cache[float] = Cache()

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update (out, in) of the matrix, scale included, computed in `dtype`."""
        raise AdapterError(f"{type(self).__name__} has no weight update")

    def base_matrix(self) -> Tensor:
        """The pretrained weight as a matrix (out, in); a quantised one is dequantised."""
        weight: Any = getattr(self.base, "weight", None)  # GPTQ has none
        return self.layer.matrix(self.base, weight)

    def base_norm(self) -> float:
        """||W0||_F; computed once for as long as the pretrained weight stays the same."""
        # The weight of a sharded model is another tensor each time it is whole, but frozen.
        sources = [] if self.sharded or self.layer.is_packed else [self.base.weight]
        return self._norm.get(sources, self._measure_norm)

    def relative_norm(self, norm: float) -> dict[str, float]:
        """The statistic relative_norm of an update with a Frobenius norm; "norm" where W0 cannot be read."""
        if not self.layer.can_read:
            return {"norm": norm}
        return {"relative_norm": norm / self.base_norm()}

    def _measure_norm(self) -> float:
        norm: float = torch.linalg.vector_norm(self.base_matrix().detach(), dtype=torch.float64).item()
        return max(norm, torch.finfo(torch.float64).tiny)

    def adapted_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W0 + dW in the layout of the base's weight, computed in `dtype`."""
        return self.layer.stored(self.base, self.base_matrix().to(dtype) + self.delta_weight(dtype))

    def unadapted(self, *args: Any, **kwargs: Any) -> Any:
        """W0 x + bias as the base computes it, or W' x + bias with the merged weight."""
        if self.merged:
            x = args[0] if args else next(iter(kwargs.values()))
            return self.layer.apply(self.base, x, self.merged_weight)
        return self.base(*args, **kwargs)

    # ---- for parents that multiply by `layer.weight` themselves and never call the layer

    @property
    def weight(self) -> Any:
        """The pretrained parameter; the adapted weight instead where `read_as_weight`."""
        raw = self.base._parameters["weight"]
        if not self.read_as_weight:
            return raw
        if self.on_read is not None:
            self.on_read()
        if not self.enabled or raw is None:
            return raw
        return self.merged_weight if self.merged else self.weight_to_read()

    def weight_to_read(self) -> Tensor:
        """The adapted weight in the layout and dtype of the pretrained one, differentiable.

        Raises:
            AdapterError: There is dropout, which needs the input.
        """
        if self.dropout > 0 and self.training:
            raise AdapterError(
                f"the model reads the weight of {self.qualified_name!r} and does not call it, so that dropout "
                f"{self.dropout} cannot act; set dropout=0 or exclude=[{self.qualified_name!r}]"
            )
        dtype = self.base.weight.dtype
        return self.adapted_weight(torch.promote_types(dtype, torch.float32)).to(dtype)

    # ---- merging

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W0 + dW."""
        return {"weight": self.adapted_weight(dtype)}

    def merged_dtype(self, name: str) -> torch.dtype:
        """As the layer stores its weight; of a quantised one, what it dequantises to."""
        return self.layer.dtype(self.base)

    def check_mergeable(self) -> None:
        """Raise if there is no weight that holds this adapter's effect.

        Raises:
            AdapterError: The adapter is nonlinear at present, or the base has no weight to merge into.
        """
        self.check_linear()
        if any(p.is_meta for p in self.base.parameters()):
            raise AdapterError(f"{self.qualified_name!r} is on the meta device: load its weights first")
        dtype = self.base_matrix().dtype
        if not dtype.is_floating_point:
            raise AdapterError(f"{self.qualified_name!r} has a weight of {dtype}: dequantise it first")

    def absorb_parameter(self, name: str, value: Tensor) -> None:
        """Write the merged weight into the base; a quantised layer becomes a plain one."""
        before, base = self.base, self.layer.with_weight(self.base, value)
        self.__dict__["base"] = base
        if base is not before:
            for name in self._base_buffers:
                del self._buffers[name]
            self._base_parameters, self._base_buffers = list(base._parameters), list(base._buffers)
        self._parameters.update(base._parameters)
