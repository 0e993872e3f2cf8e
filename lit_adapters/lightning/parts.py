"""A Lightning callback that is made of others: each part has one concern and is read, and tested, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback


class CallbackOfParts(Callback):
    """Runs each of Lightning's hooks (`setup`, `teardown`, `on_...`) in all of its parts, in their order.

    The state of the parts is not saved by this class: a subclass says in `state_dict` under which names.

    Attributes:
        parts: The callbacks, in the order in which their hooks run; a subclass sets them.
    """

    parts: Sequence[Callback] = ()


def _in_every_part(hook: str) -> Callable[..., None]:
    def run(self: CallbackOfParts, *args: Any, **kwargs: Any) -> None:
        for part in self.parts:
            getattr(part, hook)(*args, **kwargs)

    run.__name__ = hook
    run.__doc__ = f"Run `{hook}` of every part."
    return run


for _name in vars(Callback):
    if _name in ("setup", "teardown") or _name.startswith("on_"):
        setattr(CallbackOfParts, _name, _in_every_part(_name))
