"""Sends the statistics of adapters where a Trainer sends its own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

_OF_ALL_LAYERS = ("adapter/beta", "adapter/summary/", "adapter/subspace/")


def report(
    trainer: Trainer,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    scalars: Mapping[str, float],
) -> None:
    """Give scalars to the callbacks of `report_to`, and what concerns all layers to `state.log_history`.

    They are not printed, because a model has hundreds.
    """
    for callback in _reporting(trainer):
        callback.on_log(args, state, control, logs=dict(scalars), model=trainer.model)
    summary = {name: value for name, value in scalars.items() if name.startswith(_OF_ALL_LAYERS)}
    if summary:
        state.log_history.append({**summary, "epoch": state.epoch, "step": state.global_step})


def tensorboards(trainer: Trainer) -> list[Any]:
    """The open writers of TensorBoard among the callbacks of a trainer."""
    writers = [getattr(callback, "tb_writer", None) for callback in _reporting(trainer)]
    return [writer for writer in writers if writer is not None]


def _reporting(trainer: Trainer) -> list[Any]:
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
