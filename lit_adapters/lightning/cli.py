"""The LightningCLI of both applications: optimiser and schedule come from YAML and are completed from the trainer."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lit_adapters import console, methods
from lit_adapters.class_paths import find_imported
from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.adapters import read_checkpoint_file
from lit_adapters.files.checkpoint_schema import RECORD
from lit_adapters.lightning.adapter_callback import AdapterCallback
from lit_adapters.lightning.checkpoint_arguments import arguments_of_checkpoint
from lit_adapters.lightning.optimizers import TOTALS, build_optimizers
from lit_adapters.lightning.recipe_sections import check_sections, recipes
from lit_adapters.methods.method import Method, to_methods
from lit_adapters.optimizers.groups import BASE, HEAD
from lit_adapters.training.checkpoint import check_recipe, class_path
from lit_adapters.training.hyperparameters import KEY, read_hyperparameters

_KEYWORDS = ("best", "last", "hpc", "registry")  # what ckpt_path may be besides a file


class _Parser(LightningArgumentParser):
    """A parser that keeps its links: the source of a value by its target."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.links: dict[str, str] = {}

    def link_arguments(self, source: Any, target: str, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse's."""
        super().link_arguments(source, target, *args, **kwargs)
        if isinstance(source, str) and not args and not kwargs:
            self.links[target] = source


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
        kwargs.setdefault("parser_class", _Parser)
        self._parsers: list[Any] = []
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Errors come as exceptions."""
        parser = super().init_parser(exit_on_error=False, **kwargs)
        self._parsers.append(parser)
        return parser

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
            help=f"Factor on the learning rate by group, such as {{nora: 3.0, head: 10.0}}. Groups: {_groups()}. Any "
            "other key is a regular expression for whole names of parameters, which wins over groups and over earlier "
            "expressions.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, check what the parser passes over, and keep the arguments."""
        self._arguments = args
        self._check_sections(args)  # before the parser, whose message on a section of another type names no section
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            raise AdapterError(f"{one_line(error)} (--help after the subcommand lists what it takes)") from error
        self._check_sections(args)  # once more, as the recipe's classes have now been imported
        section = self.config.get(self.config.get("subcommand") or "") or self.config
        seed = section.get("seed_everything")
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise AdapterError(f"seed_everything {shown(seed)} must be a whole number from 0 to 4294967295")

    def _check_sections(self, args: ArgsType) -> None:
        """Check the sections of the recipes that arguments name."""
        classes = {"model": self._model_class, "data": self._datamodule_class, "trainer": self.trainer_class}
        known = {str(action.dest).split(".")[0] for parser in self._parsers for action in parser._actions}
        commands = set(self.subcommands())
        given = [("the recipe", args)] if isinstance(args, dict) else []
        if not isinstance(args, (dict, Namespace)):
            given = list(recipes(sys.argv[1:] if args is None else args))
        for origin, document in given:
            if isinstance(document, Mapping):
                for inner in (document, *(document[name] for name in commands & document.keys())):
                    types = {name: kind for name, kind in classes.items() if isinstance(kind, type)}
                    check_sections(inner, known | commands, types, origin)

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint file before anything is built, and take from it what the user left open.

        In place of Lightning's own, which lets the checkpoint replace what the user typed and builds what it names.

        Raises:
            AdapterError: The file is missing or torn, cannot go with what was typed, or holds what is refused.
        """
        subcommand = self.config.get("subcommand")
        section = self.config.get(subcommand or "") or {}
        given = section.get("ckpt_path")
        if given is None or str(given) in _KEYWORDS:
            return
        path = Path(given)
        if not path.exists():
            raise AdapterError(f"ckpt_path {str(path)!r} does not exist; give a file that a fit has written, or 'last'")
        if not path.is_file():
            return  # a directory of a sharded checkpoint, which holds no hyperparameters that Lightning would read
        checkpoint = read_checkpoint_file(path)
        sections = self._typed(subcommand)
        typed = sections.get("model") or {}
        present = section.get("model") or {}
        present = present.as_dict() if isinstance(present, Namespace) else dict(present)
        typed = typed.as_dict() if isinstance(typed, Namespace) else typed
        for (source, name), target in self._links_into_model().items():
            if name in (sections.get(source) or {}):
                typed = {**typed, target: sections[source][name]}
        cls: Any = self._model_class
        if self.subclass_mode_model:
            cls, typed, present = self._subclass(checkpoint, path, typed, present)
        self._check_record(subcommand, checkpoint, path, typed, present)
        if not read_hyperparameters(checkpoint, path):
            return
        filling = arguments_of_checkpoint(cls, checkpoint, path, typed, present)
        filled: dict[str, Any] = {"model": filling}
        if self.subclass_mode_model:
            filled = {"model": {"class_path": class_path(cls), "init_args": filling}}
        for (source, name), target in self._links_into_model().items():
            if target in filling:
                filled[source] = {**filled.get(source, {}), name: filling[target]}
        try:
            self.config = self.parser.parse_object({subcommand: filled}, self.config)
        except argparse.ArgumentError as error:
            raise AdapterError(f"{str(path)!r}: its hyperparameters do not fit: {one_line(error)}") from error

    def _links_into_model(self) -> dict[tuple[str, str], str]:
        """Arguments of the model that are copied from other sections: their names, by section and name there."""
        links = {target: source for parser in self._parsers for target, source in getattr(parser, "links", {}).items()}
        return {
            (source.partition(".")[0], source.partition(".")[2]): target.removeprefix("model.")
            for target, source in links.items()
            if target.startswith("model.") and source.count(".") == 1
        }

    def _typed(self, subcommand: str) -> Any:
        """What the recipe and the command line give, without defaults, and without what links copy."""
        args = self._arguments
        # jsonargparse has no switch for this: without defaults, a link may find nothing to copy and fail.
        hidden = {
            parser: vars(parser).pop("_links_group") for parser in self._parsers if "_links_group" in vars(parser)
        }
        try:
            if isinstance(args, (dict, Namespace)):
                found = self.parser.parse_object(args, defaults=False)
            else:
                found = self.parser.parse_args(args, defaults=False)
        finally:
            for parser, links in hidden.items():
                parser._links_group = links
        return found.get(subcommand) or {}

    def _subclass(
        self, checkpoint: Any, path: Path, typed: Any, present: Any
    ) -> tuple[type, dict[str, Any], dict[str, Any]]:
        """The class of the model where the recipe chooses it, and its arguments.

        Raises:
            AdapterError: The checkpoint's class is another one, or nobody has imported it.
        """
        written, chosen = checkpoint.get(KEY, {}).get("_class_path"), typed.get("class_path")
        cls, base = find_imported(chosen or str(written)), self._model_class
        if not (isinstance(cls, type) and isinstance(base, type) and issubclass(cls, base)):
            raise AdapterError(f"{str(path)!r} names the model {shown(written)}, which is not known: give --model")
        if chosen is not None and written is not None and find_imported(str(written)) is not cls:
            raise AdapterError(f"{str(path)!r} is a checkpoint of {shown(written)}, the model is a {class_path(cls)}")
        return cls, typed.get("init_args") or {}, present.get("init_args") or {}

    def _check_record(self, subcommand: str, checkpoint: Any, path: Path, typed: Any, present: Any) -> None:
        """Compare a checkpoint's record with the recipe; a run of `fit` cannot go on without one.

        All else is checked where the checkpoint is read to be resumed; see `SafeCheckpointIO`.
        """
        if subcommand != "fit" and RECORD not in checkpoint:
            return
        cls = self._model_class if isinstance(self._model_class, type) and not self.subclass_mode_model else None
        configs = None
        if "adapters" in (present if subcommand == "fit" else typed):
            configs = [method.to_config() for method in to_methods(present["adapters"])]
        check_recipe(checkpoint, cls, configs, path)

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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As LightningCLI's.

        Raises:
            AdapterError: The trainer refuses its settings.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(f"{one_line(error)}; correct the section trainer of the recipe") from error

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
    return f"{', '.join(sorted(names))} (the adapters of a method), {HEAD} (the prediction head), {BASE} (all else)"


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
