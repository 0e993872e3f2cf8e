"""Buffers of a copied adapter that something averages: they take the values of the original, not a mean.

Averages of weights (torch's `AveragedModel`, timm's `ModelEmaV3`, Lightning's callbacks) copy a model and write means
of everything into the copy. The buffers of an adapter are constants or the state of annealing. A mean of beta never
reaches 0, and a mean of a constant differs from it by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Original:
    """The table of buffers of one adapter. Copies of the adapter share this object; a file does not hold it."""

    def __init__(self, buffers: Mapping[str, Tensor | None] | None = None) -> None:
        self.buffers = {} if buffers is None else buffers

    def __deepcopy__(self, memo: Any) -> Original:
        return self

    def __reduce__(self) -> tuple[type[Original], tuple[()]]:
        return Original, ()


@torch.no_grad()
def _sum(tensor: Tensor) -> float | None:
    """The sum of the values, as PyTorch does not count writes through `tensor.data`; None where it cannot be read now.

    Only copies ask for it, as the answer waits for the device.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    if not plain or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing() or _capturing(tensor):
        return None
    return tensor.detach().sum(dtype=torch.float64).item()


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class CopiedBuffers(nn.Module):
    """The part of `AdapterModule` that keeps averages out of the buffers of a copy.

    A copy is taken for an average if something wrote to its parameters, and if that was neither loading nor moving. Its
    buffers then take the present values of the original. This ends when the copy is annealed, calibrated or trained
    itself.
    """

    _adapter_parameters: list[str]
    _adapter_buffers: list[str]
    _recomputed_buffers: list[str]

    def __init__(self) -> None:
        super().__init__()
        self._own = Original(self._buffers)  # what copies of this adapter follow
        self._original: Original | None = None  # what this adapter follows, if it is a copy
        self._noted: dict[str, tuple[Tensor, int, float | None]] = {}

    def note_tensors(self) -> None:
        """Remember how often the tensors of a copy were written to; needed after writing or replacing them."""
        if self._original is not None:
            names = (*self._adapter_parameters, *self._adapter_buffers, *self._recomputed_buffers)
            tensors = {n: t for n in names if (t := self._tensor(n)) is not None and not t.is_inference()}
            # Recomputed buffers are large, and no average has them, as state dicts leave them out.
            summed = {*names} - {*self._recomputed_buffers}
            self._noted = {n: (t, t._version, _sum(t) if n in summed else None) for n, t in tensors.items()}

    def stand_alone(self) -> None:
        """Stop following the original."""
        self._original = None
        self._noted = {}

    def begin_forward(self) -> None:
        """Stand alone from the first training pass on; until then, restore what was averaged."""
        if self._original is None or torch.compiler.is_compiling():
            return
        if self.training and torch.is_grad_enabled():
            self.stand_alone()
        else:
            self.restore_averaged()

    def restore_averaged(self) -> None:
        """Give averaged buffers the present values of the original; does nothing unless this adapter is a copy."""
        if self._original is None or torch.compiler.is_compiling():
            return
        written = {
            n
            for n, (t, version, total) in self._noted.items()
            if t is self._tensor(n) and (t._version != version or (total is not None and _sum(t) not in (None, total)))
        }
        if written.isdisjoint(self._adapter_parameters):
            return
        with torch.no_grad():
            for name in written - {*self._adapter_parameters}:
                value = self._original.buffers.get(name)
                if value is not None and not value.is_meta:
                    self._buffers[name].copy_(value)  # type: ignore[union-attr]
        self.clear_caches()
        self.note_tensors()

    def clear_caches(self) -> None:
        """Drop values that were computed from the tensors."""

    def _tensor(self, name: str) -> Tensor | None:
        return self._parameters.get(name, self._buffers.get(name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.restore_averaged()  # before a copy or a file is made of it
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        original = state.get("_own")
        copied = original is not None and original.buffers and original.buffers is not self._buffers
        self._original = original if copied else None
        self._own = Original(self._buffers)
        self.note_tensors()
