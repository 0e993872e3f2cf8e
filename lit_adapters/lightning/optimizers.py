"""Optimiser and learning-rate schedule from `{class_path, init_args}` sections, completed from model and trainer.

Lightning's own sections (`OptimizerCallable`, `LRSchedulerCallable`) know neither the parameter groups with their rates
nor the length of the training, which schedules such as CosineAnnealingLR require.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau

from lit_adapters.errors import AdapterError
from lit_adapters.optimizers.groups import parameter_groups

# What schedulers call their length. Never typed: the trainer knows it.
TOTALS = ("total_steps", "T_max", "total_iters")
# Rates that schedulers set for all groups alike, which would undo the groups' scales.
_RATES = ("max_lr", "base_lr")


def build_optimizers(
    module: LightningModule,
    optimizer: Mapping[str, Any],
    lr_scheduler: Mapping[str, Any] | None = None,
    lr_scale: Mapping[str, float] | None = None,
) -> Any:
    """Build what `configure_optimizers` returns.

    The optimiser gets trainable parameters only, grouped by `lit_adapters.optimizers.parameter_groups`. The schedule
    steps once per optimiser step, over `trainer.estimated_stepping_batches`; ReduceLROnPlateau, which waits for a
    metric, once an epoch.

    Args:
        module: Holds the trainable parameters; it belongs to a trainer.
        optimizer: `{class_path, init_args}`, without `params`.
        lr_scheduler: `{class_path, init_args}`, without `optimizer` and without the length, which is filled in.
        lr_scale: Factor on the learning rate by group; see `parameter_groups`.

    Raises:
        AdapterError: Nothing trains, `lr_scale` names an unknown group, the learning rate is missing, a class refuses
            its arguments, or a schedule needs the last step of a trainer without an end.
    """
    scale = dict(lr_scale or {})
    cls, arguments = _class_and_arguments(optimizer)
    rate = arguments.pop("lr", None)
    if rate is None:
        known = inspect.signature(cls).parameters.get("lr")
        if known is None or not isinstance(known.default, (int, float)):
            raise AdapterError(f"{cls.__name__} has no default learning rate: set lr in the optimizer's init_args")
        rate = known.default
    groups = parameter_groups(module, rate, arguments.pop("weight_decay", 0.0), scale)
    built = _build(cls, groups, lr=rate, **arguments)
    if lr_scheduler is None:
        return built
    cls, arguments = _class_and_arguments(lr_scheduler)
    if issubclass(cls, ReduceLROnPlateau):
        scheduler = _build(cls, built, **arguments)
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    accepted = inspect.signature(cls).parameters
    totals = [name for name in TOTALS if name in accepted]
    if totals:
        arguments |= dict.fromkeys(totals, _steps(module, cls.__name__))
    for name in _RATES:
        if isinstance(arguments.get(name), (int, float)):
            arguments[name] = [arguments[name] * scale.get(group["name"], 1.0) for group in groups]
    return {"optimizer": built, "lr_scheduler": {"scheduler": _build(cls, built, **arguments), "interval": "step"}}


def _class_and_arguments(section: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return resolve_name(section["class_path"]), dict(section.get("init_args") or {})


def _build(cls: Any, subject: Any, **arguments: Any) -> Any:
    try:
        return cls(subject, **arguments)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        fix = "change its init_args"
        if isinstance(error, ZeroDivisionError):  # OneCycleLR, when its warm-up is exactly one step
            fix += ", or train one step more or fewer"
        raise AdapterError(f"{cls.__name__} does not work with {given}: {error}; {fix}") from error


def _steps(module: LightningModule, scheduler: str) -> int:
    steps = module.trainer.estimated_stepping_batches
    # -1 stands for "no limit" where the length of the data is unknown.
    if not math.isfinite(steps) or steps < 0:
        raise AdapterError(f"{scheduler} needs to know the last step: set trainer.max_steps, or trainer.max_epochs")
    return max(1, int(steps))
