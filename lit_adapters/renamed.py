"""Modules that have moved, under the names that recipes, checkpoints and scripts may still hold.

To move a module whose name may stand in a file, add a line to `MODULES`. Importing the old name then gives the new
module, and `python -m OLD` runs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

# Old name: new name.
MODULES = {
    "lit_adapters.callback": "lit_adapters.lightning",
    "lit_adapters.callback.epoch_sampler": "lit_adapters.lightning.resume.sampler",
    "lit_adapters.callback.resumable_loader": "lit_adapters.lightning.resume.loader",
    "lit_adapters.optim": "lit_adapters.optimizers.groups",
    "lit_adapters.sharding": "lit_adapters.model.sharding",
    "language.asking": "language.evaluate.tasks",
    "language.choice": "language.evaluate.likelihood",
    "language.decoding": "language.draft.decoding",
    "language.distillation": "language.draft.distillation",
    "language.formats": "language.data.formats",
    "language.metrics": "language.evaluate.metrics",
    "language.mmlu": "language.evaluate.mmlu",
    "language.packing": "language.data.packing",
    "language.pair_formats": "language.dpo.formats",
    "language.pairs": "language.dpo.data",
    "language.questions": "language.grpo.data",
    "language.results": "language.evaluate.results",
    "language.rewards": "language.grpo.rewards",
    "language.rollouts": "language.grpo.rollouts",
    "language.sources": "language.data.sources",
    "language.speculative": "language.draft.speculative",
    "language.splits": "language.data.splits",
    "language.tasks": "language.evaluate.questions",
    "language.templates": "language.data.templates",
    "language.tokenise": "language.data.tokenise",
    "language.validation": "language.evaluate.validation",
}
# Classes that checkpoints record under the path on the left; their package exports them there.
CLASSES = {
    "language.data.InstructionDataModule": "language.data.module.InstructionDataModule",
    "language.dpo.DPOTuner": "language.dpo.module.DPOTuner",
    "language.draft.DraftTuner": "language.draft.module.DraftTuner",
    "language.grpo.GRPOTuner": "language.grpo.module.GRPOTuner",
}


def current(path: str) -> str:
    """The import path that a class has now, given the one that a file holds."""
    if path in CLASSES:
        return CLASSES[path]
    module, _, name = path.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else path


def recorded(path: str) -> str:
    """The import path that files hold for a class, given the one that it has now."""
    return next((old for old, new in CLASSES.items() if new == path), path)


class _Finder(MetaPathFinder):
    """Finds a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        real = importlib.util.find_spec(MODULES[fullname])
        assert real is not None
        return ModuleSpec(fullname, _Alias(real), origin=real.origin)


class _Alias(Loader):
    """Gives the module of the new name; `get_code` is for `python -m`."""

    def __init__(self, real: ModuleSpec) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(self._real.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._real  # importlib has put the one of the old name there

    def get_code(self, fullname: str) -> CodeType | None:
        return self._real.loader.get_code(self._real.name)  # type: ignore[union-attr]


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())  # before the folder of old byte code that a checkout may still have
