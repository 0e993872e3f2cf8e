"""The base of all adapters that change a weight: W' = W0 + dW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule
from lit_adapters.methods.matrix_layers import LinearLayer


class WeightAdapter(AdapterModule):
    """An adapter whose effect is an update of the base layer's weight matrix W0 (out, in).

    Subclasses give `delta_weight`, and `forward` for as long as `in_effect`.
    """

    layer: LinearLayer
    merged_weight: Tensor

    def __init__(self, base: nn.Module, layer: LinearLayer) -> None:
        super().__init__(base)
        self.layer = layer
        # Set by attach where the parent multiplies by `layer.weight` in place of calling the layer.
        self.read_as_weight = False
        self.on_read: Callable[[], object] | None = None  # told of every such reading
        self._norm: tuple[Tensor | None, int, float] | None = None  # pretrained weight, its version, and norm

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update (out, in) of the matrix, scale included, computed in `dtype`."""
        raise AdapterError(f"{type(self).__name__} has no weight update")

    def base_matrix(self) -> Tensor:
        """The pretrained weight as a matrix (out, in); a quantised one is dequantised."""
        return self.layer.matrix(self.base, self.base.weight)  # type: ignore[arg-type]

    def base_norm(self) -> float:
        """||W0||_F; computed once for as long as the pretrained weight stays the same."""
        if self.sharded and self._norm is not None:
            return self._norm[2]
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        version = 0 if weight.is_inference() else weight._version
        if self._norm is None or self._norm[0] is not weight or self._norm[1] != version:
            norm = torch.linalg.vector_norm(self.base_matrix().detach(), dtype=torch.float64).item()
            # Of a sharded model, `weight` is whole only for the moment, and is frozen.
            self._norm = (None if self.sharded else weight, version, max(norm, torch.finfo(torch.float64).tiny))
        return self._norm[2]

    def adapted_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W0 + dW in the layout of the base's weight, computed in `dtype`."""
        matrix = self.base_matrix()
        return self.layer.stored(self.base, matrix.to(dtype) + self.delta_weight(dtype))

    @property
    def weight(self) -> Any:
        """The pretrained parameter; the adapted weight instead, if the parent reads it and never calls the layer."""
        raw = self._parameters["weight"]
        if not self.read_as_weight:
            return raw
        if self.on_read is not None:
            self.on_read()
        if not self.enabled or raw is None:
            return raw
        return self.merged_weight if self.merged else self.weight_to_read()

    def weight_to_read(self) -> Tensor:
        """The adapted weight in the layout and dtype of the pretrained one, differentiable."""
        return self.adapted_weight().to(self.base.weight.dtype)  # type: ignore[arg-type]

    @property
    def in_effect(self) -> bool:
        """Whether `forward` has to apply the update: it is enabled and not merged."""
        return self.enabled and not self.merged

    @property
    def merged(self) -> bool:
        return "merged_weight" in self._buffers

    def unadapted(self, x: Tensor) -> Tensor:
        """What the layer returns while the update is not `in_effect`: with the pretrained weight, or the merged one."""
        if self.merged:
            return self.layer.apply(self.base, x, self.merged_weight)
        y: Tensor = self.base(x)
        return y

    def check_linear(self) -> None:
        """Raise if no weight could hold this adapter's effect, whatever the base; most methods are linear throughout.

        Raises:
            AdapterError: it is nonlinear at present.
        """

    def check_mergeable(self) -> None:
        """Raise if there is no weight that holds this adapter's effect.

        Raises:
            AdapterError: it is nonlinear at present, or the base has no weight to merge into.
        """
        self.check_linear()
        if self.base.weight.is_meta:  # type: ignore[union-attr]
            raise AdapterError(f"{self.qualified_name!r} is on the meta device: load its weights first")
        if not self.base_matrix().is_floating_point():
            raise AdapterError(f"{self.qualified_name!r} has a weight of {self.base.weight.dtype}: dequantise it first")

    def new_weight(self) -> tuple[Tensor, float, float]:
        """The weight with the update, as it can be stored, and the error of storing it: absolute, and relative to |W|.

        The sum is taken in float32 (float64 for a base in float64) and rounded once; the error is that against float64.
        """
        with torch.no_grad():
            stored_as = self.layer.dtype(self.base)
            weight = self.adapted_weight(torch.promote_types(stored_as, torch.float32)).to(stored_as)
            exact = self.adapted_weight(torch.float64)
            error = (weight.double() - exact).abs().max().item()
            return weight, error, error / max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)

    def merge(self) -> tuple[float, float]:
        """Compute with one merged weight from now on, kept beside the pretrained one; returns the errors."""
        weight, *errors = self.new_weight()
        self.register_buffer("merged_weight", weight, persistent=False)
        return errors[0], errors[1]

    def absorb(self) -> tuple[float, float]:
        """Write the update into the base's own weight, for good; returns the errors."""
        weight, *errors = self.new_weight()
        self.__dict__["base"] = self.layer.with_weight(self.base, weight)
        self._parameters.update(self.base._parameters)
        return errors[0], errors[1]

    def unmerge(self) -> None:
        """Forget the merged weight."""
        del self._buffers["merged_weight"]
        self._non_persistent_buffers_set.discard("merged_weight")
