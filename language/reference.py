"""The model from which an adapted one started, without a second copy of its weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lit_adapters as la
from language.loss import Batch, read
from lit_adapters.errors import AdapterError
from lit_adapters.model.modes import evaluating
from lit_adapters.model.record import attachment


class _Reader(nn.Module):
    """`language.loss.read` as a module, whose parameters can be exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        return read(self.model, batch, positions)


class Reference(nn.Module):
    """An adapted model as it was before training: adapters off, modules of `train` at their first values, no dropout.

    It is equal to the pretrained model bit for bit, which tests check for every method.

    `lit_adapters.disabled` restores the pretrained function of adapted layers alone; parameters that train besides the
    adapters would keep what they have learned. This module keeps their first values, in buffers that move with it and
    stand in no state dict, and nothing else.

    Args:
        model: As `lit_adapters.attach` left it, before any step and before a checkpoint is loaded into it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_reader"] = _Reader(model)  # no submodule: its parameters are the model's
        self._adapted = any(True for _ in la.adapters(model))
        self._names = list(attachment(model).trained_parameters)
        for number, name in enumerate(self._names):
            self.register_buffer(f"initial_{number}", model.get_parameter(name).detach().clone(), persistent=False)

    def forward(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the reference, or (B, P, V) at positions (P,); without gradients.

        Raises:
            AdapterError: The adapters are merged into the weights and cannot be taken out.
        """
        reader: _Reader = self.__dict__["_reader"]
        model: Any = reader.model
        # Other tensors take the parameters' places. If only the data were exchanged, autocast would use its old casts.
        initial = {f"model.{name}": self.get_buffer(f"initial_{i}") for i, name in enumerate(self._names)}
        if self._adapted and not any(True for _ in la.adapters(model)):
            raise AdapterError("the adapters are merged into the weights: the model is no longer its own reference")
        off = la.disabled(model) if self._adapted else nullcontext()
        with torch.no_grad(), off, evaluating(model):
            logits: Tensor = functional_call(reader, initial, (batch, positions))
        return logits
