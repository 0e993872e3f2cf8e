"""The model that an adapted one started from, without a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

import lit_adapters as la
from language.choice import evaluating


class Reference:
    """An adapted model as it was before training: adapters off, modules of `train` at their first values, no dropout.

    `lit_adapters.disabled` gives back the pretrained function of adapted layers alone; parameters that train besides
    the adapters would keep what they have learned. Their first values are kept here, and nothing else is.

    Args:
        model: as `lit_adapters.attach` left it, before any step and before a checkpoint is loaded into it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        own = {id(p) for _, adapter in la.adapters(model) for p in adapter.adapter_parameters().values()}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
        self._values = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Inside the block the model is the reference, in eval mode and without gradients."""
        parameters = [(self._model.get_parameter(name), value) for name, value in self._values.items()]
        learned = [parameter.data for parameter, _ in parameters]
        for parameter, value in parameters:
            parameter.data = value.to(parameter)
        adapted = any(True for _ in la.adapters(self._model))
        try:
            off = la.disabled(self._model) if adapted else nullcontext()
            with torch.no_grad(), off, evaluating(self._model):  # type: ignore[arg-type]
                yield
        finally:
            for (parameter, _), data in zip(parameters, learned, strict=True):
                parameter.data = data
