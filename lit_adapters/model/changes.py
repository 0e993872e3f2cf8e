"""Notices base parameters that training changes although `attach` froze them.

Code of the user, or a callback, may unfreeze a parameter after `attach` and freeze it again. A sample of the values
at `attach` tells later that it happened; keeping all values would take the memory of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_adapters.model.sharding import whole

_SAMPLES = 256  # values of each parameter; the last one is among them
_ROUNDING = 1e-6  # relative: averaging equal values moves them by less


@torch.no_grad()
def samples(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some values of every parameter, float32 on the CPU; parameters without plain floating values are left out."""
    return {name: _sample(p) for name, p in parameters.items() if _holds_values(p)}


@torch.no_grad()
def has_changed(parameter: Tensor, before: Tensor) -> bool:
    """Whether a parameter has other values than when the sample `before` was taken.

    Every process has to call this if the parameter is sharded.

    Args:
        parameter: The parameter as it is now.
        before: Its entry in what `samples` returned.
    """
    parameter = whole(parameter.detach())
    if not _holds_values(parameter):
        return False
    now = _sample(parameter)
    if now.shape != before.shape:
        return True
    then = before.to(parameter.dtype).float()  # the model may have been cast since
    return (now - then).norm().item() > _ROUNDING * then.norm().item()


def _holds_values(parameter: Tensor) -> bool:
    plain = type(parameter.detach()) is Tensor  # neither sharded nor quantised
    return plain and parameter.is_floating_point() and not parameter.is_meta and parameter.numel() > 0


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64, device=flat.device)
    return flat[places.long()].float().cpu()
