"""The states of loops, schedules and callbacks in a checkpoint, compared with those of the trainer that resumes.

ModelCheckpoint deletes the files that its state names as earlier checkpoints. Names with which it would delete files
outside its own folder are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LRScheduler

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.checkpoint_schema import RECORD, is_count, is_named, is_number, is_text
from lit_adapters.optimizers.base import AdapterOptimizer
from lit_adapters.training.annealing import is_annealing
from lit_adapters.training.rank_allocation import is_allocation
from lit_adapters.training.recording import is_recorded

# What an optimiser keeps for each parameter, once it has made a step.
_STATES = {Adam: ("step", "exp_avg", "exp_avg_sq"), AdamW: ("step", "exp_avg", "exp_avg_sq")}
_ONE_PATH = ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")


def check_states(trainer: Trainer, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse states that the trainer's loops, schedules and callbacks did not write.

    Args:
        trainer: The one that resumes.
        checkpoint: As `lit_adapters.files.checkpoint_schema` has checked it.
        path: The file, for messages.

    Raises:
        AdapterError: A state lacks a value or has one of another type, or names a file outside the place of
            checkpoints; the message names it.
    """
    for key in ("loops", "callbacks", "optimizer_states", "lr_schedulers", "epoch", "global_step", RECORD):
        if key not in checkpoint:
            _refuse(key, None, "there", path)
    if "processes" not in checkpoint[RECORD]:
        _refuse(f"{RECORD}/processes", None, "there", path)
    _check_form(trainer.fit_loop.state_dict(), checkpoint["loops"].get("fit_loop"), "loops/fit_loop", path)
    for index, schedule in enumerate(checkpoint["lr_schedulers"]):
        for name in schedule:
            # Schedules take every entry as an attribute of theirs.
            if name == "optimizer" or callable(getattr(LRScheduler, name, None)) or callable(schedule[name]):
                _refuse(f"lr_schedulers/{index}/{name}", schedule[name], "left out", path)
    saved = checkpoint["callbacks"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in saved:
            _check_callback(callback, saved[callback.state_key], f"callbacks/{callback.state_key}", path)


def check_evaluation(trainer: Trainer, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a state of the loop that evaluates, where a checkpoint is tested, validated or predicted with.

    Args:
        trainer: The one that evaluates.
        checkpoint: As `lit_adapters.files.checkpoint_schema` has checked it.
        path: The file, for messages.

    Raises:
        AdapterError: The state lacks a value or has one of another type; the message names it.
    """
    name = f"{trainer.state.fn}_loop"
    if "loops" in checkpoint and hasattr(trainer, name):
        _check_form(getattr(trainer, name).state_dict(), checkpoint["loops"].get(name), f"loops/{name}", path)


def check_optimizers(trainer: Trainer, states: list[Any], schedules: list[Any], path: str | Path) -> None:
    """Refuse states of optimisers and schedules that those of the trainer could not have written.

    Called when these are built, and their states not yet loaded.

    Args:
        trainer: The one that resumes.
        states: Those of the optimisers in the checkpoint.
        schedules: Those of the learning rate schedules.
        path: The file, for messages.

    Raises:
        AdapterError: Their number, a value or a group of parameters is missing, or has another type or shape.
    """
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        return  # a strategy that shards has a form of its own for optimisers
    if len(trainer.optimizers) != len(states):
        _refuse("optimizer_states", f"{len(states)} states", f"{len(trainer.optimizers)}, as the recipe has it", path)
    for index, (optimizer, saved) in enumerate(zip(trainer.optimizers, states, strict=True)):
        _check_optimizer(optimizer, saved, f"optimizer_states/{index}", path)
    # Averaging adds schedules in mid-run: those of the checkpoint may be more.
    for index, (config, saved) in enumerate(zip(trainer.lr_scheduler_configs, schedules, strict=False)):
        _check_kinds(config.scheduler.state_dict(), saved, f"lr_schedulers/{index}", path)


def _check_optimizer(optimizer: Any, saved: Mapping[str, Any], where: str, path: str | Path) -> None:
    own, groups = optimizer.state_dict(), saved["param_groups"]
    sizes = [[len(group["params"]) for group in side] for side in (own["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        _refuse(f"{where}/param_groups", sizes[1], f"groups of {sizes[0]} parameters, as the model has it", path)
    _check_kinds(own["param_groups"], groups, f"{where}/param_groups", path)
    if isinstance(optimizer, AdapterOptimizer):
        try:
            optimizer.check_state(saved)
        except AdapterError as error:
            raise AdapterError(f"{str(path)!r}: {where}: {error}") from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=True))
    for index, entry in saved["state"].items():
        if index not in by_index:
            _refuse(f"{where}/state/{index}", entry, "left out", path)
        names = _STATES.get(type(optimizer), ())
        missing = [name for name in names if name not in entry]
        if missing:
            _refuse(f"{where}/state/{index}/{missing[0]}", None, "there", path)
        for name, value in entry.items():
            shape = by_index[index].shape if name in names and name != "step" else None
            if not _is_state(value) or (isinstance(value, Tensor) and shape not in (None, value.shape)):
                _refuse(f"{where}/state/{index}/{name}", value, "a tensor of the parameter's shape or a number", path)
            if name in names and not isinstance(value, Tensor):
                _refuse(f"{where}/state/{index}/{name}", value, "a tensor", path)


def _is_state(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(inner is None or isinstance(inner, (Tensor, int, float)) for inner in value)
    if isinstance(value, Mapping):
        return all(inner is None or isinstance(inner, (Tensor, int, float)) for inner in value.values())
    return value is None or isinstance(value, (Tensor, int, float))


def _check_kinds(own: Any, saved: Any, where: str, path: str | Path) -> None:
    """Compare the types of saved values with those of an object that has not been loaded yet."""
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            _refuse(where, saved, "values by name", path)
        for name in (name for name in own if isinstance(name, str)):
            if name not in saved:
                _refuse(f"{where}/{name}", None, "there", path)
            _check_kinds(own[name], saved[name], f"{where}/{name}", path)
    elif isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(own):
            _refuse(where, saved, f"a list of {len(own)}", path)
        for index, inner in enumerate(own):
            _check_kinds(inner, saved[index], f"{where}/{index}", path)
    elif isinstance(own, bool):
        if not isinstance(saved, bool):
            _refuse(where, saved, "true or false", path)
    elif isinstance(own, (int, float)):
        if not is_number(saved) and not (isinstance(saved, Tensor) and saved.numel() == 1):
            _refuse(where, saved, "a number", path)
    elif isinstance(own, str) and not is_text(saved):
        _refuse(where, saved, "text", path)


def _check_callback(callback: Callback, state: Any, where: str, path: str | Path) -> None:
    own = callback.state_dict()
    if not is_named(state):
        _refuse(where, state, "values by name", path)
    missing = [name for name in own if name not in state]
    if missing:
        _refuse(f"{where}/{missing[0]}", None, "there", path)
    if isinstance(callback, ModelCheckpoint):
        _check_paths(callback, state, where, path)
    annealing, recorded = state.get("annealing"), state.get("recorded")
    if "annealing" in own and not is_annealing(annealing):
        _refuse(f"{where}/annealing", annealing, "the state of an annealing", path)
    if "recorded" in own and not is_recorded(recorded):
        _refuse(f"{where}/recorded", recorded, "the state of a recorder", path)
    if "annealing" in own and "allocation" in state and not is_allocation(state["allocation"]):
        _refuse(f"{where}/allocation", state["allocation"], "the state of a rank allocation", path)


def _check_paths(callback: ModelCheckpoint, state: Mapping[str, Any], where: str, path: str | Path) -> None:
    kept = state["best_k_models"]
    if not is_named(kept):
        _refuse(f"{where}/best_k_models", kept, "scores by path", path)
    scheme = str(callback.dirpath).partition("://")[0] if "://" in str(callback.dirpath) else None
    for name, value in [*((name, state[name]) for name in _ONE_PATH), *(("best_k_models", key) for key in kept)]:
        if not is_text(value) and not (name == "dirpath" and value is None):
            _refuse(f"{where}/{name}", value, "a path", path)
        found = str(value or "")
        # ModelCheckpoint deletes whatever has another protocol, and takes ".." for a folder below its own.
        elsewhere = "::" in found or ("://" in found and found.partition("://")[0] != scheme)
        if elsewhere or ".." in PurePath(found).parts:
            _refuse(f"{where}/{name}", value, "the path of a checkpoint of this run, without '..'", path)


def _check_form(own: Any, saved: Any, where: str, path: str | Path) -> None:
    """Compare a saved state with one of the same loop, into its parts."""
    if isinstance(own, Mapping):
        if not is_named(saved):
            _refuse(where, saved, "values by name", path)
        for name, value in own.items():
            if name not in saved:
                _refuse(f"{where}/{name}", None, "there", path)
            _check_form(value, saved[name], f"{where}/{name}", path)
    elif isinstance(own, bool):
        if not isinstance(saved, bool):
            _refuse(where, saved, "true or false", path)
    elif isinstance(own, int) and not is_count(saved):
        _refuse(where, saved, "a whole number", path)


def _refuse(where: str, value: Any, what: str, path: str | Path) -> NoReturn:
    raise AdapterError(
        f"{str(path)!r}: {shown(where, 200)} in the checkpoint is {shown(value)}, and must be {what}; take an "
        "undamaged one, or one of this run"
    )
