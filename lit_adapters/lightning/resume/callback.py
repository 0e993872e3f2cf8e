"""The part of AdapterCallback that makes a resumed run equal the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_adapters.errors import AdapterError
from lit_adapters.files.atomic import remove_leftovers
from lit_adapters.files.checkpoint_schema import RECORD, check_checkpoint
from lit_adapters.lightning.checkpoint_arguments import check_base
from lit_adapters.lightning.resume import loop_state
from lit_adapters.lightning.resume.checkpoint_io import SafeCheckpointIO
from lit_adapters.lightning.resume.plain_loader import FollowedLoader, FollowingLoaders
from lit_adapters.lightning.resume.random_state import random_states, set_random_states
from lit_adapters.lightning.resume.state_forms import check_evaluation, check_optimizers, check_states
from lit_adapters.training.checkpoint import check_model, record
from lit_adapters.training.left_out import put_copies_back
from lit_adapters.training.processes import gather_objects

INTERRUPTED = "last-interrupted.ckpt"  # found by ckpt_path="last"
TERMINATED = 128 + 15  # what shells give a process that SIGTERM has ended


class Resuming(Callback):
    """Saves and restores what Lightning leaves out, and refuses checkpoints that do not belong to the run.

    A checkpoint also holds the record of what was trained, the random states of torch, numpy and Python, what the order
    of plain loaders comes from, gradients that wait for their optimiser step, the values that were logged last, and the
    loops' state with the batch completed. Each process has random states, gradients and values of its own: a checkpoint
    holds those of all, in the order of their ranks.

    Lightning's own loops leave out the validation that is due after the checkpoint, the update of schedules that follow
    a metric, and the start of an epoch that goes on; they never load a loader's state where a schedule has asked for
    the number of steps, and count steps twice. This is put right. Files are written beside their place and renamed, so
    that a kill while saving leaves the last good one.

    Raises:
        AdapterError: A checkpoint file is torn, does not belong to the run (see `check_model`), or was written while
            StochasticWeightAveraging measured batch norms.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._loading: Any = None  # states of optimisers and schedules, and the path of their checkpoint
        self._going_on: list[FollowedLoader] = []  # whose epoch was broken off
        self._rates_due = False  # schedules that follow a metric step once the checkpoint is written
        self._rates_done = False  # they have, and Lightning repeats it
        self._step = 0  # before the present batch
        self._validated = False  # since the last batch
        self._interrupted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read, check and write checkpoint files safely, unless the trainer has an interface of its own for it."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO(partial(_check, trainer), partial(_complete, trainer))
        # A fit before may have failed.
        self._restored = self._loading = self._pending = None
        self._going_on, self._rates_due, self._rates_done = [], False, False
        if stage == "fit" and not isinstance(trainer.strategy.process_dataloader, FollowingLoaders):
            process = trainer.strategy.process_dataloader
            trainer.strategy.process_dataloader = FollowingLoaders(process)  # type: ignore[method-assign, assignment]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is about to be loaded, and remove what a killed process left beside its checkpoints."""
        if self._loading is not None:
            check_optimizers(trainer, *self._loading)
            self._loading = None
        if not trainer.is_global_zero:
            return
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folders = {Path(trainer.default_root_dir), *(Path(saver.dirpath) for saver in savers)}  # type: ignore[arg-type]
        if trainer.ckpt_path is not None:
            folders.add(Path(trainer.ckpt_path).parent)
        for path in (path for folder in folders for path in remove_leftovers(folder, ".ckpt")):
            rank_zero_info(f"removed {path}, which a process that was killed has left")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record, the random states and open gradients; complete the state of the loops; flush the loggers."""
        stepped = trainer.global_step != self._step or loop_state.between_epochs(trainer)
        # Under manual optimisation one optimiser may have stepped, and another not.
        open_step = not stepped or not pl_module.automatic_optimization
        own = {
            "random": random_states(pl_module.device),
            "gradients": _gradients(pl_module) if open_step else {},
            "metrics": _scalars(trainer.callback_metrics),
            "loaders": _states_of_loaders(trainer),
        }
        checkpoint[RECORD] = {**record(pl_module), "processes": gather_objects(own)}
        if trainer.state.fn == "fit":
            loops = checkpoint["loops"]["fit_loop"]
            pending = loop_state.pending_record(trainer)
            checkpoint[RECORD]["rates_due"] = loop_state.rates_due(trainer)
            checkpoint[RECORD]["rates_done"] = loop_state.rates_done(trainer, self._interrupted, self._validated)
            loop_state.complete_batch(trainer, loops, self._interrupted, self._validated)
            if pending is not None:
                checkpoint[RECORD]["pending"] = pending
        # What came before the checkpoint must not be lost with the process.
        for logger in trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this process's part until training starts."""
        files = trainer.strategy.checkpoint_io
        # ModelParallelStrategy reads files by itself, and has taken the weights out by now; a user may have a reader of
        # their own.
        if not (isinstance(files, SafeCheckpointIO) and files.has_checked(checkpoint)):
            _check(trainer, {"state_dict": {}, **checkpoint}, trainer.ckpt_path)
        if trainer.state.fn != "fit":
            return
        self._pending = checkpoint[RECORD].get("pending")
        self._rates_due = checkpoint[RECORD].get("rates_due", False)
        self._rates_done = checkpoint[RECORD].get("rates_done", False)
        self._loading = checkpoint["optimizer_states"], checkpoint["lr_schedulers"], trainer.ckpt_path
        processes = checkpoint[RECORD]["processes"]
        if len(processes) == trainer.world_size:
            self._restored = processes[trainer.global_rank]
        else:
            self._restored = {"random": None, "gradients": {}, "metrics": processes[0].get("metrics", {})}
            warnings.warn(
                f"the checkpoint was written by {len(processes)} processes and is resumed by {trainer.world_size}: "
                "the rest of the training will not be the one of an uninterrupted run, bit for bit",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, as the last thing before the first epoch or batch."""
        self._validated = self._interrupted = False
        self._step = -1
        self._log_pending(trainer)
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self._going_on = _restore_loaders(trainer, restored.get("loaders", []))
        goes_on = not loop_state.between_epochs(trainer)
        if goes_on:
            _check_averaging(trainer)
        loop_state.repair_resumed_loop(trainer, bool(self._going_on))
        trainer.callback_metrics.update(restored.get("metrics", {}))
        if goes_on:
            self._begin_epoch(trainer, pl_module)
        if self._rates_due:
            loop_state.step_rates(trainer)
        if self._rates_done:
            _pass_over(trainer.fit_loop.epoch_loop, "update_lr_schedulers")
        self._rates_due = self._rates_done = False
        if restored["gradients"]:
            self._step = trainer.global_step
            _restore_gradients(pl_module, restored["gradients"], trainer.ckpt_path)
        if restored["random"] is not None:
            set_random_states(restored["random"], pl_module.device)

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning's callbacks that change the trainer as an epoch begins do so in one that goes on."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        own = next(i for i, c in enumerate(callbacks) if c is self or self in getattr(c, "parts", ()))
        for i, callback in enumerate(callbacks):
            if isinstance(callback, GradientAccumulationScheduler) and i > own:
                # Once this training begins it looks whether the number of batches was changed, as it is here.
                callback.on_train_start(trainer, pl_module)
                _pass_over(callback, "on_train_start")
            if isinstance(callback, (GradientAccumulationScheduler, StochasticWeightAveraging)):
                callback.on_train_epoch_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the process before did not, also where nothing was left to train."""
        self._log_pending(trainer)

    def _log_pending(self, trainer: Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(pending["values"], step=pending["step"])
            logger.save()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the steps before the batch."""
        self._step, self._validated = trainer.global_step, False

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """Let loaders that have gone on begin their next epoch with its first batch."""
        self._end_going_on()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where the module has ended the epoch with its first batch."""
        self._end_going_on()

    def _end_going_on(self) -> None:
        for loader in self._going_on:
            loader.followed.start_anew()
        self._going_on = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a validation has come after the last batch."""
        self._validated = not trainer.sanity_checking

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After SIGTERM, which Lightning hands on once the batch is done: save, and end with the usual status."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._interrupted = True
        saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
        path = Path(saver.dirpath if saver else trainer.default_root_dir) / INTERRUPTED  # type: ignore[arg-type]
        trainer.save_checkpoint(path)
        rank_zero_info(f"stopped by SIGTERM after step {trainer.global_step}; resume with ckpt_path={os.fspath(path)}")
        exception.code = TERMINATED


def _check(trainer: Trainer, checkpoint: dict[str, Any], path: Any) -> None:
    """Refuse a checkpoint that does not belong to the run; evaluation also reads one without a record."""
    check_checkpoint(checkpoint, path)
    if RECORD in checkpoint or trainer.state.fn == "fit":
        check_model(checkpoint, trainer.lightning_module, path)
    if trainer.state.fn == "fit":
        check_states(trainer, checkpoint, path)
    else:
        check_evaluation(trainer, checkpoint, path)
    check_base(trainer.lightning_module, checkpoint, path)


def _complete(trainer: Trainer, checkpoint: dict[str, Any], path: Any) -> None:
    put_copies_back(checkpoint, trainer.lightning_module, path)


def _restore_loaders(trainer: Trainer, states: list[dict[str, Any] | None]) -> list[FollowedLoader]:
    """Let the training loaders go on where they were, or warn.

    Returns:
        The plain loaders that need a new iterator for this, in mid-epoch.

    Raises:
        AdapterError: An epoch that was broken off has another number of batches now.
    """
    loaders = tree_leaves(trainer.train_dataloader)
    states = states if len(states) == len(loaders) else [None] * len(loaders)
    pairs = list(zip(loaders, states, strict=True))
    if not loop_state.between_epochs(trainer):
        for loader, state in pairs:
            if isinstance(loader, FollowedLoader) and state is not None:
                loader.followed.check_length(state)
    if not loop_state.in_mid_epoch(trainer):
        for loader, state in pairs:
            if isinstance(loader, FollowedLoader) and state is not None:
                loader.followed.set_generators(state)
        return []
    known = []
    for loader, state in pairs:
        if isinstance(loader, FollowedLoader) and state is not None and state["start"] is not None:
            read = loop_state.batches_read(trainer, len(loader))
            loader.followed.go_on(state, read, trainer.current_epoch)
            known.append(loader)
    # Lightning's own warning takes every loader without a state for one that cannot go on.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    if any(loader not in known and not _is_stateful(loader) for loader in loaders):
        warnings.warn(
            "resuming in mid-epoch with a training loader whose order is not known: batches of this epoch will be "
            "repeated and others left out. Give the module a lit_adapters.ResumableLoader whose sampler is torch's "
            "DistributedSampler(dataset, trainer.world_size, trainer.global_rank, seed=0), or resume from the end of "
            "an epoch",
            stacklevel=3,
        )
    return known


def _check_averaging(trainer: Trainer) -> None:
    """Check that an epoch that goes on is one of the training.

    Raises:
        AdapterError: It only measures batch norms after StochasticWeightAveraging.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and trainer.current_epoch > callback.swa_end:
            raise AdapterError(
                f"{str(trainer.ckpt_path)!r} was written while StochasticWeightAveraging measured batch norms, after "
                "the last epoch of the training, and what it had measured is not in it: resume from the end of that "
                "epoch"
            )


def _states_of_loaders(trainer: Trainer) -> list[dict[str, Any] | None]:
    """What the order of plain loaders comes from; of an epoch only where its batches can be counted."""
    loaders = tree_leaves(trainer.train_dataloader)
    states = [loader.followed.state_dict() if isinstance(loader, FollowedLoader) else None for loader in loaders]
    if trainer.state.fn == "fit" and loop_state.takes_several_batches(trainer):
        return [state and {**state, "start": None} for state in states]
    return states


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _restore_gradients(pl_module: LightningModule, gradients: dict[str, Tensor], path: Any) -> None:
    for name, parameter in pl_module.named_parameters():
        if name not in gradients:
            continue
        if gradients[name].shape != parameter.shape:
            raise AdapterError(
                f"{str(path)!r}: the gradient of {name!r} has the shape {tuple(gradients[name].shape)}, and the "
                f"parameter {tuple(parameter.shape)}; take an undamaged one"
            )
        parameter.grad = gradients[name].to(parameter)


def _pass_over(owner: Any, method: str) -> None:
    """Leave out the next call of a method."""

    def passed_over(*arguments: Any, **named: Any) -> None:
        delattr(owner, method)

    setattr(owner, method, passed_over)


def _scalars(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logged values, which schedules and callbacks may still look at."""
    scalars = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and value.numel() == 1}
    return {name: value.detach().cpu() for name, value in scalars.items()}


def _gradients(pl_module: LightningModule) -> dict[str, Tensor]:
    """Gradients that wait for further batches of their optimiser step."""
    found = {n: p.grad.detach().cpu() for n, p in pl_module.named_parameters() if p.grad is not None}
    return {n: g for n, g in found.items() if type(g) is Tensor}
