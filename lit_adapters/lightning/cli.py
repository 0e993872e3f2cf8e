"""The LightningCLI of both applications: optimiser and schedule come from YAML and are completed from the trainer."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lit_adapters import console, methods
from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import check_whole, read_checkpoint_file
from lit_adapters.lightning.adapter_callback import AdapterCallback
from lit_adapters.lightning.optimizers import TOTALS, build_optimizers
from lit_adapters.methods.base import Method, to_methods
from lit_adapters.optimizers.groups import HEAD
from lit_adapters.training.checkpoint import check_recipe

_KEYWORDS = ("best", "last", "hpc", "registry")  # what ckpt_path may be besides a file


class AdapterCLI(LightningCLI):
    """LightningCLI with `optimizer`, `lr_scheduler` and `lr_scale` sections; see `build_optimizers`.

    Raises:
        AdapterError: The arguments or the YAML are not valid (in place of a usage text and `SystemExit`), or a
            checkpoint file is missing, torn, or of another run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        # The report of `attach` says more than Lightning's table, whose largest row is "model".
        kwargs["trainer_defaults"] = {"enable_model_summary": False, **(kwargs.get("trainer_defaults") or {})}
        kwargs["auto_configure_optimizers"] = False
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Errors come as exceptions."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections."""
        parser.add_subclass_arguments((Optimizer,), "optimizer", instantiate=False, fail_untyped=False, skip={"params"})
        parser.add_subclass_arguments(
            LRSchedulerTypeTuple,
            "lr_scheduler",
            instantiate=False,
            fail_untyped=False,
            skip={"optimizer", *TOTALS},
        )
        parser.add_argument(
            "--lr_scale",
            type=dict[str, float],
            default={},
            help=f"Factor on the learning rate by group, such as {{nora: 3.0, head: 0.5}}. Groups: {_groups()}.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look at the checkpoint file before anything is built."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            raise AdapterError(f"{one_line(error)} (--help after the subcommand lists what it takes)") from error
        section = self.config.get(self.config.get("subcommand") or "") or {}
        path = section.get("ckpt_path")
        if path is None or str(path) in _KEYWORDS:
            return
        if not Path(path).exists():
            raise AdapterError(f"ckpt_path {str(path)!r} does not exist; give a file that a fit has written, or 'last'")
        if self.config.get("subcommand") == "fit":
            self._check_recipe(Path(path), section.get("model") or {})
        elif Path(path).is_file():
            check_whole(path, "ckpt_path ")

    def _check_recipe(self, path: Path, model: Any) -> None:
        """Compare a checkpoint with the recipe, whose settings Lightning is about to replace by the checkpoint's.

        All else is checked where the checkpoint is read to be resumed; see `SafeCheckpointIO`.
        """
        cls = self._model_class if isinstance(self._model_class, type) and not self.subclass_mode_model else None
        configs = None
        if "adapters" in model:
            configs = [method.to_config() for method in to_methods(model.as_dict()["adapters"])]
        check_recipe(read_checkpoint_file(path), cls, configs, path)

    def instantiate_classes(self) -> None:
        """Instantiate everything and give the model its `configure_optimizers`."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse's wrapping of what the classes themselves say about their arguments.
            if not str(error).startswith("Does not validate"):
                raise
            raise AdapterError(one_line(error)) from error
        config = self.config_init.get(str(self.subcommand), self.config_init)
        sections = {key: config.get(key) for key in ("optimizer", "lr_scheduler", "lr_scale")}
        if sections["optimizer"] is not None:
            self.model.configure_optimizers = partial(build_optimizers, self.model, **sections)
        elif self.subcommand == "fit":
            raise AdapterError("no optimiser: add an `optimizer:` section with class_path and init_args to the YAML")
        if self.subcommand == "fit":
            self._require_annealing()

    def _require_annealing(self) -> None:
        """Raise if a method is annealed and nothing in the recipe anneals.

        Raises:
            AdapterError: There is no AdapterCallback.
        """
        if any(isinstance(callback, AdapterCallback) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        for method in to_methods(self.model.hparams.get("adapters")):
            for part in method.parts():
                schedule = getattr(part, "schedule", None)
                if schedule is not None and schedule(0.0) != schedule(1.0):
                    raise AdapterError(
                        f"{type(part).__name__} is annealed and the recipe has nothing that does it: add "
                        "`- class_path: lit_adapters.AdapterCallback` to trainer.callbacks"
                    )


def _groups() -> str:
    """The groups that a learning rate can be scaled for, in words."""
    kinds = [kind for kind in vars(methods).values() if isinstance(kind, type) and issubclass(kind, Method)]
    # A method that is composed of others has no group of its own.
    names = [kind.name for kind in kinds if kind is not Method and kind.parts is Method.parts]
    return f"{', '.join(sorted(names))} (the adapters of a method), {HEAD} (everything that is not an adapter)"


def run(main: Callable[[], Any]) -> None:
    """Run a command line; bad input ends it with one line on stderr and exit status 1."""
    quieten()

    def explained() -> None:
        try:
            main()
        except RuntimeError as error:
            fix = next((fix for words, fix in _OF_LIGHTNING.items() if words in str(error)), None)
            if fix is None:
                raise
            raise AdapterError(f"{one_line(error)}; {fix}") from error

    console.run(explained, MisconfigurationException)


# What Lightning says of mistakes in a recipe, as RuntimeErrors, and the fix.
_OF_LIGHTNING = {
    "more than one stateful callback of type": "keep one of them in trainer.callbacks",
    "conditioned on metric": "change `monitor` of the callback in trainer.callbacks",
}


def quieten() -> None:
    """Drop messages that a user of the recipes can do nothing about."""
    # Lightning's own use of torch; and its advice on loaders, which the recipes have weighed.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
    # Said whenever a checkpoint is tested, as each run logs to a folder of its own.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    chatter.addFilter(lambda record: not record.getMessage().startswith("💡 Tip:"))
