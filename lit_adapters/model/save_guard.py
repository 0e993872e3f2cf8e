"""Keeps `save_pretrained` of an adapted transformers model from writing a directory that loads as the base model.

The same holds for a merged model in which learned functions stay, such as NoRA's.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lit_adapters.activations import LEARNED_ACTIVATIONS
from lit_adapters.errors import AdapterError

_METHOD = "save_pretrained"


class SaveGuard:
    """Stands for `save_pretrained` of one model while it has adapters.

    transformers' Trainer passes the argument `state_dict` and resumes from such a directory with the adapters in place,
    so that its checkpoints are written, with a warning; see `save_for_trainer`.

    Args:
        model: The model.
        functions: Whether the adapters are merged and their functions (NoRA's, say) are what stays.
    """

    def __init__(self, model: nn.Module, functions: bool = False) -> None:
        self.model = model
        self._functions = functions
        before = vars(model).get(_METHOD)
        self.before = before if isinstance(before, SaveGuard) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save for a trainer.

        Raises:
            AdapterError: The call does not come from transformers' Trainer: it gives no `state_dict`.
        """
        what, fix = self._advice()
        if "state_dict" not in kwargs:
            raise AdapterError(
                f"save_pretrained would write a directory that from_pretrained loads as {type(self.model).__name__} "
                f"without its {what}; {fix}"
            )
        return self.save_for_trainer(*args, **kwargs)

    def save_for_trainer(self, *args: Any, **kwargs: Any) -> Any:
        """Write the whole model, and warn; `lit_adapters.huggingface` has a form that writes the adapters alone."""
        what, fix = self._advice()
        if not self._functions:
            fix += ". With lit_adapters.huggingface.AdapterTrainerCallback the Trainer saves the adapters"
        warnings.warn(f"from_pretrained loads this directory without the {what} in it; {fix}", stacklevel=3)
        model: Any = self.model
        return type(model).save_pretrained(model, *args, **kwargs)

    def _advice(self) -> tuple[str, str]:
        """What from_pretrained would leave out, and what to do instead."""
        if self._functions:
            return "learned functions", (
                "lit_adapters.huggingface.save_with_functions(model, directory) writes one that from_pretrained loads "
                "with trust_remote_code=True, and save_adapters before merging keeps the adapters"
            )
        return "adapters", (
            "lit_adapters.save_adapters(model, directory) saves the adapters, and lit_adapters.merge(model) makes an "
            "ordinary model to save"
        )


def guard_saving(model: nn.Module, functions: bool = False) -> None:
    """Put a guard before `save_pretrained` of every part of `model` that is a model of transformers.

    Args:
        model: The model.
        functions: See `SaveGuard`; then parts without a learned function are left alone.
    """
    for module in model.modules():
        saves = callable(getattr(type(module), _METHOD, None)) and hasattr(module, "config")
        if saves and (not functions or any(isinstance(m, LEARNED_ACTIVATIONS) for m in module.modules())):
            vars(module)[_METHOD] = SaveGuard(module, functions)


def free_saving(model: nn.Module) -> None:
    """Take the guards away, except those for functions that an earlier merge left in the model."""
    for module in model.modules():
        guard = vars(module).get(_METHOD)
        if isinstance(guard, SaveGuard):
            del vars(module)[_METHOD]
            if guard.before is not None:
                vars(module)[_METHOD] = guard.before
