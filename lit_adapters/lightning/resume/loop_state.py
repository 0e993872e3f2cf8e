"""Where in its loops Lightning goes on after a checkpoint.

A checkpoint that ModelCheckpoint writes after a batch holds the loops in the middle of it: Lightning takes the batch
for done, but leaves out what follows it (the validation that is due, the end of the epoch), and repeats after a stop
what was done already. Here the loops are put right, once as they are saved and once before the first batch after
resuming, so that all that an uninterrupted run does is done, once. The names are those of Lightning's loops, which have
no public interface for this; tests/lightning/resume/test_private_interfaces.py lists them.
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

_BATCH, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def complete_batch(trainer: Trainer, loops: dict[str, Any], interrupted: bool, validated: bool) -> None:
    """Change the saved state of the fit loop, in place, into that of a batch that is done.

    Args:
        trainer: The one that writes the checkpoint.
        loops: The state of its fit loop.
        interrupted: Whether SIGTERM has ended the run, which it does after a batch or within a validation.
        validated: Whether a validation has ended since the batch.
    """
    batch, counts = loops[_BATCH], loops["epoch_loop.state_dict"]
    steps = 0 if trainer.fit_loop._should_accumulate() else 1
    due = _validation_due(trainer)
    if batch["current"]["processed"] > batch["current"]["completed"]:
        for counter in (batch["total"], batch["current"]):
            counter["completed"] = counter["processed"]
        if between_epochs(trainer):
            return  # the module has ended the epoch with this batch, and nothing follows
        counts["_batches_that_stepped"] += 0 if due else steps
    elif not interrupted or between_epochs(trainer) or not due:
        return
    elif validated:
        # A validation that is over is passed over, but its batch is then counted as a step for the second time.
        counts["_batches_that_stepped"] -= steps
        return
    if due:
        # An unfinished validation is what Lightning returns to; its first batch is the unfinished one.
        done = loops[_VALIDATION]["total"]["completed"]
        for name, total in (("ready", 1), ("started", 1), ("processed", 0), ("completed", 0)):
            loops[_VALIDATION]["total"][name] = done + total
            loops[_VALIDATION]["current"][name] = 0


def pending_record(trainer: Trainer) -> dict[str, Any] | None:
    """What Lightning is going to log once the checkpoint that is being written is there.

    ModelCheckpoint saves at the end of a batch or an epoch, before its values are logged. A process that is killed in
    between would lose them.

    Returns:
        The `step` and the `values` by name; None if nothing follows.
    """
    fit, connector = trainer.fit_loop, trainer._logger_connector
    if not (trainer.training and trainer.loggers):
        return None
    batch: Any = fit.epoch_loop.batch_progress.current
    epoch: Any = fit.epoch_progress.current
    step: Any = fit.epoch_loop._batches_that_stepped
    if batch.processed > batch.completed and not between_epochs(trainer):
        accumulates = fit._should_accumulate() and trainer.lightning_module.automatic_optimization
        if accumulates or not connector.should_update_logs:
            return None
    elif epoch.processed > epoch.completed and between_epochs(trainer) and connector._first_loop_iter is None:
        step -= 1
    else:
        return None
    values = convert_tensors_to_scalars(connector.metrics["log"])
    if not values:
        return None
    if "step" in values:
        step = values.pop("step")
    else:
        values.setdefault("epoch", trainer.current_epoch)
    return {"step": int(step), "values": {name: float(value) for name, value in values.items()}}


def rates_due(trainer: Trainer) -> bool:
    """Whether schedules that follow a metric step once the checkpoint that is being written is there.

    Lightning updates them after a batch. Where a validation is due, a resumed run repeats it and then the update, so
    that this is False.
    """
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    waits = between_epochs(trainer) or trainer.fit_loop._should_accumulate() or _validation_due(trainer)
    return bool(batch.processed > batch.completed and not waits)


def rates_done(trainer: Trainer, interrupted: bool, validated: bool) -> bool:
    """Whether these schedules have stepped after a validation, and a resumed run would let them do so again.

    Arguments are those of `complete_batch`. Lightning passes over the validation, but does what follows it.
    """
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done = batch.processed == batch.completed and not between_epochs(trainer)
    return bool(interrupted and validated and done and _validation_due(trainer))


def step_rates(trainer: Trainer) -> None:
    """Update the schedules that follow a metric after each step, as a batch that is done does."""
    trainer.fit_loop.epoch_loop._update_learning_rates("step", update_plateau_schedulers=True)


def batches_read(trainer: Trainer, length: int) -> int:
    """How many batches of a loader the present epoch has read; for a loader that is repeated, in its current pass.

    Args:
        trainer: The one that resumes.
        length: Batches of the loader. Loaders that are read together may differ in it.
    """
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    if trainer.fit_loop._combined_loader._mode == "max_size_cycle":  # type: ignore[union-attr]
        return (batches - 1) % length + 1 if batches else 0
    return min(batches, length)


def takes_several_batches(trainer: Trainer) -> bool:
    """Whether the steps of the epoch, which take batches from an iterator, have taken more than one each."""
    fetcher = trainer.fit_loop._data_fetcher
    steps: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return isinstance(fetcher, _DataLoaderIterDataFetcher) and fetcher.fetched > steps


def _validation_due(trainer: Trainer) -> bool:
    fit = trainer.fit_loop
    return bool(fit._data_fetcher is not None and fit.epoch_loop._should_check_val_fx(fit._data_fetcher))


def in_mid_epoch(trainer: Trainer) -> bool:
    """Whether the checkpoint that a trainer resumes from left batches of an epoch to train."""
    return not between_epochs(trainer) and not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def between_epochs(trainer: Trainer) -> bool:
    """Whether an epoch has ended and no other has begun."""
    current: Any = trainer.fit_loop.epoch_progress.current
    return bool(current.ready == current.started == current.processed)


def repair_resumed_loop(trainer: Trainer, new_iterator: bool = False) -> None:
    """Correct the loop counters that Lightning restores wrongly, before the first batch of a resumed fit.

    Args:
        trainer: The one that resumes.
        new_iterator: Whether the loaders have learned where to go on after their iterators were made.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if in_mid_epoch(trainer) and (fit._combined_loader_states_to_load or new_iterator):
        # Whoever asks for the number of steps (schedules do) makes Lightning build the loaders before their states are
        # there, and it never loads them then.
        fit._load_combined_loader_states()
        iter(fit._data_fetcher)  # type: ignore[arg-type]
    # The learning rate schedules that follow a metric are held back for loops that restart: the metric is there again.
    fit._restarting = False
    # Batches come from an iterator made when the uninterrupted run made its own: after the hooks that begin an epoch.
    fit._resuming_from_checkpoint = False
    epoch.val_loop.batch_progress.reset()
    if between_epochs(trainer):
        # With max_steps Lightning would end the epoch for the second time.
        epoch._restarting = epoch.val_loop._restarting = False
        fit.reset_restart_stage()
        epoch.reset_restart_stage()
        counters: tuple[Any, ...] = (fit.epoch_progress.total, fit.epoch_progress.current)
        for counter in counters:
            counter.completed = counter.processed
    elif epoch._num_ready_batches_reached() and not _validation_due(trainer):
        # Nothing is left to read, but Lightning looks: a loader that cannot go on would begin anew.
        vars(fit._data_fetcher).update(iterator=iter(()), batches=[])
