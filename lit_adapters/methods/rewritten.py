"""Refuses functions of torch that would rewrite the parameters of a layer and know nothing of its adapter.

Fusing a batch norm scales W0 and leaves the update as it is; pruning and parametrisations take the weight out of its
place. The functions are recognised as they register or delete a parameter.
"""

from __future__ import annotations

import sys

from torch import nn

from lit_adapters.errors import AdapterError

_FUSION, _PARAMETRIZE = "torch.nn.utils.fusion", "torch.nn.utils.parametrize"
_SUFFIXES = ("_orig", "_g", "_v")  # of what pruning, weight norm and spectral norm register


def called_by(module: str) -> bool:
    """Whether the function that asks was called from a module, directly or by at most three calls in between."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame.f_globals.get("__name__") == module:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class KeptParameters(nn.Module):
    """The part of `AdapterModule` that keeps the parameters of the base in their place."""

    qualified_name: str
    _base_parameters: list[str]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module.

        Raises:
            AdapterError: The caller fuses the layer with a norm, prunes it or parametrises its weight.
        """
        rewritten = [p for p in self.__dict__.get("_base_parameters", ()) if name in [p + s for s in _SUFFIXES]]
        if rewritten or called_by(_FUSION):
            raise AdapterError(self._advice(rewritten[0] if rewritten else name))
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_base_parameters", ()) and called_by(_PARAMETRIZE):
            raise AdapterError(self._advice(name))
        super().__delattr__(name)

    def _advice(self, name: str) -> str:
        return (
            f"{name!r} of {self.qualified_name!r} cannot be fused, pruned or parametrised while the layer is adapted, "
            "as the adapter would not follow; call lit_adapters.merge(model) first, or do it before attach"
        )
