"""Sends the statistics of adapters where a Trainer sends its own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from lit_adapters.training.boards import Board, MLflow, TensorBoard, WeightsAndBiases

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


def boards(trainer: Trainer) -> list[Board]:
    """Where a trainer's callbacks show figures: open writers of TensorBoard, runs of Weights & Biases and MLflow."""
    found: list[Board] = []
    for callback in _reporting(trainer):
        kind = type(callback).__name__
        if getattr(callback, "tb_writer", None) is not None:
            found.append(TensorBoard(callback.tb_writer))
        elif kind == "WandbCallback" and getattr(callback._wandb, "run", None) is not None:
            found.append(WeightsAndBiases(callback._wandb.run))
        elif kind == "MLflowCallback" and callback._ml_flow is not None and callback._ml_flow.active_run():
            found.append(MLflow(callback._ml_flow.MlflowClient(), callback._ml_flow.active_run().info.run_id))
    return found


def _reporting(trainer: Trainer) -> list[Any]:
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
