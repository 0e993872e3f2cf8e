"""Keeps `save_pretrained` of an adapted transformers model from writing a directory that loads as the base model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError

_METHOD = "save_pretrained"


class SaveGuard:
    """Stands for `save_pretrained` of one model while it has adapters.

    transformers' Trainer passes the argument `state_dict` and resumes from such a directory with the adapters in place,
    so that its checkpoints are written, with a warning.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save for a trainer.

        Raises:
            AdapterError: It is no trainer that saves.
        """
        model: Any = self._model
        fix = (
            "lit_adapters.save_adapters(model, directory) saves the adapters, and lit_adapters.merge(model) makes an "
            "ordinary model to save"
        )
        if "state_dict" not in kwargs:
            raise AdapterError(
                f"save_pretrained would write a directory that from_pretrained loads as {type(model).__name__} without "
                f"its adapters; {fix}"
            )
        warnings.warn(f"from_pretrained loads this directory without the adapters in it; {fix}", stacklevel=2)
        return type(model).save_pretrained(model, *args, **kwargs)


def guard_saving(model: nn.Module) -> None:
    """Put a guard before `save_pretrained` of every part of `model` that is a model of transformers."""
    for module in model.modules():
        if callable(getattr(type(module), _METHOD, None)) and hasattr(module, "config"):
            vars(module)[_METHOD] = SaveGuard(module)


def free_saving(model: nn.Module) -> None:
    """Take the guards away."""
    for module in model.modules():
        if isinstance(vars(module).get(_METHOD), SaveGuard):
            del vars(module)[_METHOD]
