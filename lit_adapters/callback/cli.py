"""The LightningCLI of both applications: optimiser and schedule come from YAML and are completed from the trainer."""

from __future__ import annotations

import importlib
import inspect
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple, ReduceLROnPlateau
from torch.optim import Optimizer

from lit_adapters.errors import AdapterError
from lit_adapters.optim import parameter_groups

# What schedulers call their length. Never typed: the trainer knows it.
_TOTALS = ("total_steps", "T_max", "total_iters")


class AdapterCLI(LightningCLI):
    """LightningCLI with `optimizer`, `lr_scheduler` and `lr_scale` sections.

    Schedulers step once per optimiser step, over `trainer.estimated_stepping_batches`. The optimiser gets trainable
    parameters only, grouped by `lit_adapters.optim.parameter_groups`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        super().__init__(*args, auto_configure_optimizers=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections; the image size is given once, to the data."""
        parser.add_subclass_arguments((Optimizer,), "optimizer", instantiate=False, fail_untyped=False, skip={"params"})
        parser.add_subclass_arguments(
            LRSchedulerTypeTuple,
            "lr_scheduler",
            instantiate=False,
            fail_untyped=False,
            skip={"optimizer", *_TOTALS},
        )
        parser.add_argument(
            "--lr_scale",
            type=dict[str, float],
            default={},
            help="Factor on the learning rate by group: nora, lora, head (all that trains and is no adapter).",
        )

    def instantiate_classes(self) -> None:
        """Instantiate everything and give the model its `configure_optimizers`."""
        super().instantiate_classes()
        config = self.config_init.get(str(self.subcommand), self.config_init)
        sections = {key: config.get(key) for key in ("optimizer", "lr_scheduler", "lr_scale")}

        def configure_optimizers(module: LightningModule) -> Any:
            return build_optimizers(module, **sections)

        if sections["optimizer"] is not None:
            self.model.configure_optimizers = MethodType(configure_optimizers, self.model)
        elif self.subcommand == "fit":
            raise AdapterError("no optimiser: add an `optimizer:` section with class_path and init_args to the YAML")


def _class_and_arguments(section: Any) -> tuple[Any, dict[str, Any]]:
    module, _, name = section["class_path"].rpartition(".")
    arguments = section.get("init_args") or {}
    return getattr(importlib.import_module(module), name), dict(arguments)


def build_optimizers(module: LightningModule, optimizer: Any, lr_scheduler: Any, lr_scale: dict[str, float]) -> Any:
    """What `configure_optimizers` returns, from `{class_path, init_args}` sections.

    Raises:
        AdapterError: nothing trains, or `lr_scale` names an unknown group.
    """
    cls, arguments = _class_and_arguments(optimizer)
    default = inspect.signature(cls).parameters["lr"].default
    lr = arguments.pop("lr", default)
    groups = parameter_groups(module, lr, arguments.pop("weight_decay", 0.0), lr_scale)
    built = cls(groups, lr=lr, **arguments)
    if lr_scheduler is None:
        return built
    cls, arguments = _class_and_arguments(lr_scheduler)
    if issubclass(cls, ReduceLROnPlateau):
        scheduler = cls(built, **arguments)
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    accepted = inspect.signature(cls).parameters
    # A schedule needs one step at least; an empty fast_dev_run would give it none.
    steps = max(1, int(module.trainer.estimated_stepping_batches))
    arguments |= {name: steps for name in _TOTALS if name in accepted}
    if "max_lr" in accepted:  # given once for all groups, which would undo their scales
        arguments["max_lr"] = [arguments["max_lr"] * lr_scale.get(g["name"], 1.0) for g in groups]
    return {"optimizer": built, "lr_scheduler": {"scheduler": cls(built, **arguments), "interval": "step"}}
