"""Says that a training ended before annealing did, where no trainer says it: on saving and at the end of the process.

`merge` refuses such adapters by itself. The progress that was reached is kept beside the adapters, as these are usually
gone when the process ends.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.schedules import Schedule


@dataclass(eq=False)
class _Progress:
    """How far the annealing of one model got.

    Attributes:
        adapter: The first annealed one, as long as it lives.
        name: The name of its layer.
        schedule: Its schedule.
        reached: The last progress in [0, 1].
        began_linear: Whether the adapters were linear when their training began, and were not moved since.
        told_elsewhere: Whether a trainer says how the annealing ended.
        warned: Whether saving has already warned.
    """

    adapter: weakref.ref[AdapterModule]
    name: str
    schedule: Schedule
    reached: float = 0.0
    began_linear: bool = False
    told_elsewhere: bool = False
    warned: bool = False

    def is_unfinished(self) -> bool:
        """Whether beta is above 0: by the adapter itself, or by the schedule when it is gone."""
        adapter = self.adapter()
        if adapter is not None and not adapter.beta.is_meta:  # type: ignore[operator, union-attr]
            return adapter.beta.item() > 0  # type: ignore[operator, no-any-return]
        return not self.began_linear and self.schedule(self.reached) > 0


_progress: weakref.WeakKeyDictionary[AdapterModule, _Progress] = weakref.WeakKeyDictionary()
_begun: set[_Progress] = set()  # trainings of this process


def note_progress(adapters: Iterable[AdapterModule], progress: float | None = None) -> None:
    """Note that adapters are being trained.

    Args:
        adapters: Those of one model.
        progress: What they were moved to; None after an optimiser step, which does not move them.
    """
    state = _of(adapters)
    if state is not None and not state.told_elsewhere:
        if progress is not None:
            state.reached, state.began_linear = progress, False
        _begun.add(state)


def leave_the_end_to_others(adapters: Iterable[AdapterModule]) -> None:
    """A trainer moves these adapters, and says itself how their annealing ends; or they are removed."""
    state = _of(adapters)
    if state is not None:
        state.told_elsewhere = True
        _begun.discard(state)


def warn_unfinished(model: nn.Module, what: str) -> None:
    """Warn, once for a model, that `what` holds adapters that were trained and whose annealing has not ended.

    Args:
        model: The model with adapters.
        what: What is written, such as a directory; the warning begins with it.
    """
    found = [m for m in model.modules() if isinstance(m, AdapterModule)]
    state = _of(found)
    if state is None or state.warned or not state.is_unfinished():
        return
    adapter = state.adapter()
    if adapter is None or not any(p.any() for name, p in adapter.adapter_parameters().items() if name == "lora_B"):
        return  # nothing has trained yet
    state.warned = True
    count = sum(a.schedule is not None for a in found)
    warnings.warn(f"{what} holds {_sentence(count, state, f'beta {adapter.beta.item():g}')}", stacklevel=3)  # type: ignore[operator]


def _sentence(count: int, state: _Progress, where: str) -> str:
    return (
        f"{count} adapters that are still nonlinear ({where}, {state.name!r} first) and cannot be merged: their "
        "training has not reached the end of annealing. Train on, with lit_adapters.set_progress(model, step / steps) "
        f"up to 1, or choose a schedule that ends earlier than {state.schedule}"
    )


def _of(adapters: Iterable[AdapterModule]) -> _Progress | None:
    """The state of the first adapter that is to become linear."""
    for adapter in adapters:
        if adapter.schedule is not None and adapter.schedule(1.0) == 0.0:
            if adapter not in _progress:
                linear = not adapter.beta.is_meta and adapter.beta.item() == 0  # type: ignore[operator, union-attr]
                found = _Progress(weakref.ref(adapter), adapter.qualified_name, adapter.schedule, began_linear=linear)
                _progress[adapter] = found
            return _progress[adapter]
    return None


def _at_exit() -> None:
    # Where an error ended the process, the user reads of that error. Of several processes the first one warns.
    if getattr(sys, "last_value", None) is not None or os.environ.get("RANK", "0") != "0":
        return
    early = [state for state in _begun if state.is_unfinished()]
    if early:
        state = early[0]
        warnings.warn(
            f"the process ends, and {len(early)} trained models are still nonlinear ({state.name!r} at progress "
            f"{state.reached:g} of {state.schedule}): they cannot be merged. Train to the end of the schedule, with "
            "lit_adapters.set_progress(model, step / steps) up to 1, or choose one that ends earlier",
            stacklevel=1,
        )


atexit.register(_at_exit)
