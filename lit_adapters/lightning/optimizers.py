"""Optimiser and learning-rate schedule from `{class_path, init_args}` sections, completed from model and trainer.

Lightning's own sections (`OptimizerCallable`, `LRSchedulerCallable`) know neither the parameter groups with their rates
nor the length of the training, which schedules such as CosineAnnealingLR require.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from lit_adapters.errors import AdapterError
from lit_adapters.optimizers.groups import scaled_groups
from lit_adapters.optimizers.pair_optimizer import PairOptimizer, check_clipping

# What schedulers call their length. Never typed: the trainer knows it.
TOTALS = ("total_steps", "T_max", "total_iters")
# Rates that schedulers set for all groups alike, which would undo the groups' scales.
_RATES = ("max_lr", "base_lr")
_LOWEST_RATES = ("eta_min", "min_lr")
_WARM_UP = 0.3  # the share of OneCycleLR, by default
_TRIED_STEPS = 200  # of a schedule, before the training


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
        lr_scale: Factor on the learning rate by group or regular expression; see `parameter_groups`.

    Raises:
        AdapterError: Nothing trains, a key of `lr_scale` is not a group and matches nothing, the learning rate is
            missing, a rate, scale or decay is negative or not finite, a class refuses its arguments, the trainer clips
            what the optimiser clips by itself, a schedule fails or leaves the positive numbers in its first steps, or
            it needs the last step of a trainer without an end.
    """
    cls, arguments = _class_and_arguments(optimizer)
    rate = arguments.pop("lr", None)
    if rate is None:
        known = inspect.signature(cls).parameters.get("lr")
        if known is None or not isinstance(known.default, (int, float)):
            raise AdapterError(f"{cls.__name__} has no default learning rate: set lr in the optimizer's init_args")
        rate = known.default
    pairs = isinstance(cls, type) and issubclass(cls, PairOptimizer)
    groups = scaled_groups(module, rate, arguments.pop("weight_decay", 0.0), lr_scale, pairs)
    built = _build(cls, [group for group, _ in groups], lr=rate, **arguments)
    if pairs:
        check_clipping(module.trainer.gradient_clip_val, "gradient_clip_val", [built])
    if lr_scheduler is None:
        return built
    cls, arguments = _class_and_arguments(lr_scheduler)
    _check_rates(cls.__name__, arguments)
    if issubclass(cls, ReduceLROnPlateau):
        scheduler = _build(cls, built, **arguments)
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    accepted = inspect.signature(cls).parameters
    totals = [name for name in TOTALS if name in accepted]
    if totals:
        arguments |= dict.fromkeys(totals, _steps(module, cls.__name__))
    for name in _RATES:
        if isinstance(arguments.get(name), (int, float)):
            arguments[name] = [arguments[name] * factor for _, factor in groups]
    if issubclass(cls, OneCycleLR) and arguments.get("pct_start", _WARM_UP) * arguments["total_steps"] == 1:
        # Its warm-up of exactly one step would divide by zero; this one is shorter by a rounding error.
        arguments["pct_start"] = arguments.get("pct_start", _WARM_UP) * (1 - 1e-12)
    scheduler = _build(cls, built, **arguments)
    _try(scheduler, min(_TRIED_STEPS, arguments[totals[0]] if totals else _TRIED_STEPS), arguments)
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _check_rates(scheduler: str, arguments: Mapping[str, Any]) -> None:
    """Check the rates that a schedule is given.

    Raises:
        AdapterError: The highest is not above 0, or the lowest negative, or one is not finite.
    """
    for name in (*_RATES, *_LOWEST_RATES):
        given = arguments.get(name)
        for rate in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(rate, (int, float)) and not (0 < rate < math.inf or (rate == 0 and name != "max_lr")):
                wanted = "above 0" if name == "max_lr" else "of at least 0"
                raise AdapterError(
                    f"{scheduler}: {name} {rate!r} must be a finite number {wanted}; change it in the init_args"
                )


def _try(scheduler: LRScheduler, steps: int, arguments: Mapping[str, Any]) -> None:
    """Take the first steps of a schedule, and put it back.

    Raises:
        AdapterError: A step fails, or a rate gets negative or not finite.
    """
    optimizer, name = scheduler.optimizer, type(scheduler).__name__
    kept = copy.deepcopy(scheduler.state_dict())
    groups = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimiser has not stepped
            for step in range(steps):
                rates = [float(group["lr"]) for group in optimizer.param_groups]
                if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
                    raise AdapterError(
                        f"{name} with {given} gives the learning rate {min(rates):g} in step {step}; rates must be "
                        "finite and at least 0: change its init_args"
                    )
                if step + 1 < steps:
                    scheduler.step()
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _refusal(name, arguments, error) from error
    finally:
        scheduler.load_state_dict(kept)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)


def check_resumed_schedules(fresh: Sequence[LRScheduler], saved: Sequence[Mapping[str, Any]], path: Any) -> None:
    """Refuse to go on with a schedule that ends before the run, and whose rates mean nothing after its end.

    Args:
        fresh: The schedules as this run would have them from its start.
        saved: Their states in the checkpoint, which are about to take their place.
        path: Where the checkpoint was read, for the message.

    Raises:
        AdapterError: OneCycleLR or CosineAnnealingLR is shorter in the checkpoint than in this run.
    """
    for scheduler, state in zip(fresh, saved, strict=False):
        for name in ("total_steps", "T_max"):
            now, then = getattr(scheduler, name, None), state.get(name)
            if isinstance(now, int) and isinstance(then, int) and then < now:
                raise AdapterError(
                    f"the {type(scheduler).__name__} of {str(path)!r} ends after {then} steps, this run after {now}: "
                    "its rates have no meaning beyond its end. Resume with the run's own max_epochs and max_steps; to "
                    "train on, start a new run with load_from_checkpoint"
                )


def _class_and_arguments(section: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return resolve_name(section["class_path"]), dict(section.get("init_args") or {})


def _build(cls: Any, subject: Any, **arguments: Any) -> Any:
    try:
        return cls(subject, **arguments)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _refusal(cls.__name__, arguments, error) from error


def _refusal(name: str, arguments: Mapping[str, Any], error: Exception) -> AdapterError:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return AdapterError(f"{name} does not work with {given}: {error}; change its init_args")


def _steps(module: LightningModule, scheduler: str) -> int:
    steps = module.trainer.estimated_stepping_batches
    # -1 stands for "no limit" where the length of the data is unknown.
    if not math.isfinite(steps) or steps < 0:
        raise AdapterError(f"{scheduler} needs to know the last step: set trainer.max_steps, or trainer.max_epochs")
    return max(1, int(steps))
