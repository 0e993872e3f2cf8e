"""What a step of a recipe takes, before weights or data are loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.lightning.optimizers import build_optimizers
from lit_adapters.training.step_cost import Example, StepCost, step_cost

# The applications of a checkout, by an argument that their model alone has.
PROGRAMS = {
    "backbone": "vision",
    "beta": "language.dpo",
    "label_smoothing": "language.dpo",
    "rewards": "language.grpo",
    "keep_layers": "language.draft",
    "target": "language.draft",
    "model": "language",
}
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
# The recipe may be for a machine that is not this one, and a run has no folder.
_HERE = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.callbacks=null",
)


@dataclass(frozen=True)
class Recipe:
    """What an estimate needs of a recipe.

    Attributes:
        module: The LightningModule, which builds its model later.
        example: Its training step.
        optimizer: Makes the optimiser of a model.
        autocast: The dtype of products under autocast; None without it.
        weights: The dtype that all weights are cast to; None leaves them.
        accumulated: Batches of a step.
    """

    module: Any
    example: Example
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    autocast: torch.dtype | None
    weights: torch.dtype | None
    accumulated: int

    def cost(self, foreach: bool = False) -> StepCost:
        """What a step takes; `foreach` as for `step_cost`."""
        with _quiet():
            return step_cost(self.example, self.optimizer, self.autocast, self.weights, foreach, self.accumulated > 1)


def read_recipe(file: Path, settings: Sequence[str] = (), program: str | None = None) -> Recipe:
    """Read a recipe of a training. Neither weights nor data are loaded.

    Args:
        file: The recipe.
        settings: Changes of it, as KEY=VALUE.
        program: The module with the command line `main`; by default the application whose model the recipe has.

    Raises:
        AdapterError: The recipe cannot be read, or its module has no `training_example`.
    """
    program = program or program_of(file)
    arguments = [f"--config={file}", *(f"--{setting}" for setting in settings), *_HERE]
    try:
        main = import_module(f"{program}.__main__").main
    except ModuleNotFoundError as error:
        here = str(error.name).split(".")[0] == program.split(".")[0]
        fix = (
            "run it in the folder of the checkout"
            if here
            else f"pip install -e '.[{program.split('.')[0]}]' installs it"
        )
        raise AdapterError(f"--program {program}: {error}; {fix}") from error
    with _quiet():
        try:
            cli = main(arguments, run=False)
        except AdapterError as error:
            raise AdapterError(f"{error} (read as a recipe of {program}; --program says whose it is)") from error
    module, section = cli.model, cli.config["optimizer"]
    if not hasattr(module, "training_example"):
        raise AdapterError(f"{type(module).__name__} has no training_example, which an estimate needs")
    if section is None:
        raise AdapterError(f"{str(file)!r} has no section optimizer, whose states take memory: add it")

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        module.model, module.trainer = model, cli.trainer
        built: torch.optim.Optimizer = build_optimizers(module, section, lr_scale=cli.config["lr_scale"])
        return built

    precision, accumulated = str(cli.trainer.precision), cli.trainer.accumulate_grad_batches
    if precision not in _PRECISIONS:
        raise AdapterError(f"trainer.precision {precision!r} is not estimated: use {', '.join(_PRECISIONS)}")
    if accumulated < 1:
        raise AdapterError(f"trainer.accumulate_grad_batches={accumulated} must be at least 1")
    halves = None if precision == "32-true" else torch.bfloat16
    return Recipe(
        module,
        module.training_example(cli.datamodule),
        optimizer,
        autocast=halves if precision.endswith("mixed") else None,
        weights=halves if precision.endswith("true") else None,
        accumulated=accumulated,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what is said of a training, which this is not."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def program_of(recipe: Path) -> str:
    """The application whose model takes what the recipe gives it.

    Raises:
        AdapterError: The recipe cannot be read, or neither does.
    """
    try:
        given = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    except OSError as error:
        raise AdapterError(f"--config {str(recipe)!r}: {error}") from error
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise AdapterError(f"{str(recipe)!r} has no section model: give a recipe of a training") from error
    for argument, program in PROGRAMS.items():
        if isinstance(given, dict) and argument in given:
            return program
    raise AdapterError(f"{str(recipe)!r} names neither a backbone nor a language model: give --program")
