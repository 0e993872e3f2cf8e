"""Merging: the base's parameters take up what an adapter does.

The adapter says which parameters and what they become (`merges_into`, `merged_parameters`). Rounding them once,
measuring the error, keeping or writing the result and undoing it are the same for all methods, and written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError


class Merging(nn.Module):
    """The part of `AdapterModule` that merges.

    Attributes:
        merges_into: Names of the base's parameters that merging changes, such as "weight" or "bias". Empty if no
            parameter can hold this adapter's effect; `folded` then says what merging leaves.
    """

    merges_into: Sequence[str] = ()
    method: ClassVar[str]
    qualified_name: str
    base: Any
    _base_parameters: list[str]
    _merged_names: list[str]  # of the parameters that are merged at present

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The base's parameters with this adapter's effect in them, for the names in `merges_into`.

        Args:
            dtype: What to compute in; the results have it too.

        Raises:
            AdapterError: No parameters can hold the effect, or not at present.
        """
        raise AdapterError(f"{type(self).__name__} ({self.qualified_name!r}) cannot be merged; detach or keep it")

    def merged_dtype(self, name: str) -> torch.dtype:
        """The dtype that a merged parameter is stored in: the pretrained one's, or the weight's for a new one."""
        parameter = self.base._parameters.get(name)
        dtype: torch.dtype = (self.base._parameters["weight"] if parameter is None else parameter).dtype
        return dtype

    def check_linear(self) -> None:
        """Raise if no parameters could hold this adapter's effect, whatever the base; most methods always pass.

        Raises:
            AdapterError: The adapter is nonlinear at present.
        """

    def merge_obstacle(self) -> str:
        """Why merging cannot put the effect into the layer's parameters now; empty if it can."""
        if not self.merges_into:
            return f"no parameter of a layer can hold what {self.method} does"
        try:
            self.check_linear()
        except AdapterError as error:
            return str(error)
        return ""

    def check_mergeable(self) -> None:
        """Raise if the effect cannot be merged into the base's parameters.

        Raises:
            AdapterError: The adapter is nonlinear at present, or a parameter is on the meta device or not floating.
        """
        self.check_linear()
        for name in self.merges_into:
            parameter = self.base._parameters.get(name)
            if parameter is not None and (parameter.is_meta or not parameter.is_floating_point()):
                state = "on the meta device" if parameter.is_meta else f"of {parameter.dtype}"
                raise AdapterError(f"{self.qualified_name}.{name} is {state}: load or dequantise it first")

    @torch.no_grad()
    def _stored_parameters(self) -> tuple[dict[str, Tensor], float, float]:
        """The merged parameters as they can be stored, and the error of storing them: absolute, and relative.

        They are computed in float32 (float64 for a base in float64) and rounded once. The error is the difference from
        float64; the relative error is that over the largest value of the parameter.
        """
        dtypes = {name: self.merged_dtype(name) for name in self.merges_into}
        wide = torch.promote_types(next(iter(dtypes.values())), torch.float32)
        stored = {name: value.to(dtypes[name]) for name, value in self.merged_parameters(wide).items()}
        exact = self.merged_parameters(torch.float64)
        error = relative = 0.0
        for name, value in stored.items():
            off = (value.double() - exact[name]).abs().max().item()
            size = max(exact[name].abs().max().item(), torch.finfo(torch.float64).tiny)
            error = max(error, off if math.isfinite(off) else math.inf)
            relative = max(relative, off / size if math.isfinite(off) else math.inf)
        return stored, error, relative

    def merge(self) -> tuple[float, float]:
        """Compute with merged parameters from now on, kept beside the pretrained ones.

        Returns:
            The absolute and the relative error of storing them.
        """
        parameters, *errors = self._stored_parameters()
        for name, value in parameters.items():
            self.register_buffer(f"merged_{name}", value, persistent=False)
        self._merged_names = list(parameters)
        return errors[0], errors[1]

    def absorb(self) -> tuple[float, float]:
        """Write the merged parameters into the base, for good.

        Returns:
            The absolute and the relative error of storing them.
        """
        parameters, *errors = self._stored_parameters()
        for name, value in parameters.items():
            self.absorb_parameter(name, value)
        return errors[0], errors[1]

    def absorb_parameter(self, name: str, value: Tensor) -> None:
        """Write one merged parameter into the base; a parameter that the base lacks is added to it."""
        parameter = self.base._parameters.get(name)
        if parameter is None:
            self._base_parameters += [name] if name not in self._base_parameters else []
            self.base._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            parameter.data.copy_(value)

    def unmerge(self) -> None:
        """Compute with the pretrained parameters again."""
        for name in self._merged_names:
            del self._buffers[f"merged_{name}"]
            self._non_persistent_buffers_set.discard(f"merged_{name}")
        self._merged_names = []

    def folded(self) -> nn.Module:
        """A plain module with this adapter's function, where `merges_into` is empty; `merge` puts it in its place."""
        raise AdapterError(f"{type(self).__name__} ({self.qualified_name!r}) cannot be merged; detach or keep it")
