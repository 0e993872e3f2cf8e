"""Watches the first optimiser steps after `attach`, in any training loop, for adapters that take no part in them.

Such an adapter fails silently: another library froze it or put a module of its own in its place, or the model never
calls its layer. Gradients tell, whoever calls the model and whatever compiles, wraps or checkpoints it, so that the
model itself carries no hook. The look is taken after a step of a `torch.optim.Optimizer` on the model's parameters; it
costs nothing once the first two steps are over. A copy of a model, or one that was unpickled, is not watched.
"""

from __future__ import annotations

import re
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.meta import offloads
from lit_adapters.model.unfinished import note_progress

_STEPS = 2  # after which experts and dropped layers should have had a gradient
_IDLE_STEPS = 100  # steps in which nothing of the model has a gradient, before it is watched no longer


class Watch:
    """What was attached to one model, and which of it has learned.

    Args:
        found: The adapters by name, right after `attach`.

    Attributes:
        asks_for_gradients: False where somebody else checks that every adapter runs.
    """

    def __init__(self, found: dict[str, AdapterModule]) -> None:
        self._adapters = {name: weakref.ref(adapter) for name, adapter in found.items()}
        self._learned: set[str] = set()
        self._steps = self._without_gradient = 0
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # they hold nothing of this model
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # they have stepped
        self._held: set[str] = set()  # adapters that an optimiser has
        self.asks_for_gradients = True

    def look(self, model: nn.Module, optimizer: Optimizer) -> str | None:
        """Look at the adapters after a step of `optimizer`.

        Returns:
            None to go on watching; otherwise what is wrong, empty if all is well.
        """
        if optimizer in self._others:
            return None
        present = {id(module) for module in model.modules()}
        alive = {name: adapter for name, ref in self._adapters.items() if (adapter := ref()) is not None}
        offloaded = [n for n, a in alive.items() if offloads(a) and id(a) in present]
        if offloaded:
            return self._sentence(model, {_OFFLOADED: offloaded})
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {id(p): p for p in model.parameters()}
        parameters |= {id(p): p for a in alive.values() for p in a.adapter_parameters().values()}
        stepped = [p for key, p in parameters.items() if key in held]
        if not stepped:
            self._others.add(optimizer)
            return None
        own_parameters = {
            n: [p for p in a.adapter_parameters().values() if isinstance(p, nn.Parameter)] for n, a in alive.items()
        }
        with_gradient = {n for n, own in own_parameters.items() if any(p.grad is not None for p in own)}
        if all(p.grad is None for p in stepped) and not with_gradient:  # a step that changes nothing of the model
            self._without_gradient += 1
            return None if self._without_gradient < _IDLE_STEPS else ""
        self._steps += 1
        again = optimizer in self._seen  # then every optimiser of the loop should have had its turn
        self._seen.add(optimizer)
        self._held |= {n for n, own in own_parameters.items() if any(id(p) in held for p in own)}
        note_progress(alive.values())
        lost = [name for name in self._adapters if name not in alive or id(alive[name]) not in present]
        frozen, idle = [], []
        for name, adapter in alive.items():
            own = list(adapter.adapter_parameters().values())
            if name in lost or not own:
                continue
            if not any(p.requires_grad for p in own):
                frozen.append(name)
            elif any(p.grad is not None for p in own):
                self._learned.add(name)
            elif name not in self._learned and any(id(p) in held for p in own):
                idle.append(name)
        if not self.asks_for_gradients:
            idle = []
        # Where layers of other numbers have learned, this may be an expert without a token, or a dropped layer.
        kinds = {_kind(name) for name in self._learned}
        unheld = [n for n in own_parameters if n in with_gradient and n not in self._held and n not in lost]
        ends = self._steps >= _STEPS and (again or self._steps >= _IDLE_STEPS)
        if lost or frozen or ends or any(_kind(name) not in kinds for name in idle):
            return self._sentence(model, {_LOST: lost, _FROZEN: frozen, _IDLE: idle, _UNHELD: unheld if ends else []})
        return None

    def _sentence(self, model: nn.Module, found: dict[str, list[str]]) -> str:
        parts = [f"{_few(names)} {what}" for what, names in found.items() if names]
        count = sum(map(len, found.values()))
        head = f"{count} of {len(self._adapters)} adapters of {type(model).__name__} take no part in this training: "
        return head + "; ".join(parts) if parts else ""


_OFFLOADED = (
    "have weights that accelerate offloads, so that gradients go to copies of them (train without offloading, or "
    "attach to a model that fits, such as one quantised to NF4)"
)
_LOST = (
    "are in the model no longer (another library put modules of its own in their place: let it do so before attach, or "
    "keep it away from these layers)"
)
_FROZEN = (
    "do not require a gradient (get_peft_model and other libraries freeze what is not theirs: call "
    "requires_grad_(True) on the adapters' parameters and give them to the optimiser, or attach last)"
)
_IDLE = (
    "received no gradient (the model reads these weights or fuses the layers, and does not call them: exclude them, or "
    "turn the fusion off; experts without a token and dropped layers may still get theirs)"
)
_UNHELD = (
    "have gradients but are in no optimiser that has stepped, so that they stay as they are (make the optimiser after "
    "attach, or load_adapters, from the parameters that require a gradient)"
)


def _kind(name: str) -> str:
    """What layers have in common that differ in their number alone."""
    return re.sub(r"[0-9]+", "#", name)


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_watched: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(model: nn.Module, found: dict[str, AdapterModule]) -> None:
    """Warn, once, if one of the adapters takes no part in the first steps of a training of `model`."""
    if found:
        _watched[model] = Watch(found)


def forget(model: nn.Module) -> None:
    """Watch `model` no longer."""
    _watched.pop(model, None)


def leave_gradients_to_others(model: nn.Module) -> None:
    """Somebody else checks that the adapters of `model` run; go on watching for frozen and replaced ones."""
    if model in _watched:
        _watched[model].asks_for_gradients = False


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched or torch.compiler.is_compiling():
        return
    for model, state in list(_watched.items()):
        failure = state.look(model, optimizer)
        if failure is not None:
            forget(model)
        if failure:
            warnings.warn(failure, stacklevel=3)


register_optimizer_step_post_hook(_look)
