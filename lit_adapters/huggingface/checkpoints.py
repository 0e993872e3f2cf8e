"""What transformers' Trainer writes and reads of a model that `attach` has adapted: its adapters alone.

A checkpoint folder then holds what `save_adapters` writes, and `load_adapters` reads it. The tensors stand there a
second time as model.safetensors, the name under which the Trainer looks for weights when it resumes or loads the best
model. The folder has no config.json, so `from_pretrained` refuses it.
"""

from __future__ import annotations

import pickle
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import TENSORS, write_adapters
from lit_adapters.files.atomic import write_atomically
from lit_adapters.files.checkpoint_schema import is_named, is_number
from lit_adapters.model.record import adapters
from lit_adapters.model.save_guard import SaveGuard
from lit_adapters.training.annealing import is_annealing
from lit_adapters.training.rank_allocation import is_allocation
from lit_adapters.training.recording import is_recorded

STATE = "lit_adapters.pt"


class AdapterWriter(SaveGuard):
    """Stands for `save_pretrained` of an adapted model: for a Trainer it saves the adapters, for others it raises.

    Args:
        model: What was given to `attach`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.before = None if self.before is None else self.before.before  # it takes the place of that guard
        vars(model)["save_pretrained"] = self

    def save_for_trainer(self, directory: str | Path, is_main_process: bool = True, **_: Any) -> None:
        """Write the adapters, as `save_adapters` does, and their tensors under the name that the Trainer reads."""
        if is_main_process:
            directory = Path(directory)
            write_adapters(self.model, directory)
            write_atomically(directory / SAFE_WEIGHTS_NAME, lambda path: shutil.copyfile(directory / TENSORS, path))


def folder_of(output_dir: str | None, step: int) -> Path:
    """The folder in which the Trainer writes a checkpoint."""
    return Path(output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def save_state(model: nn.Module, folder: Path, step: int, parts: Mapping[str, Any]) -> None:
    """Write what a resumed run needs besides the weights.

    Args:
        model: Holds the adapters.
        folder: Of the checkpoint.
        step: Optimiser steps that are done.
        parts: Tensors and plain values by the name of the part.
    """
    state = {"step": step, "adapters": _digest(model), **parts}
    write_atomically(folder / STATE, lambda path: torch.save(state, path))


def load_state(model: nn.Module, folders: list[Path], step: int) -> Mapping[str, Any]:
    """What `save_state` wrote for the adapters that have just been loaded.

    Args:
        model: Holds the adapters of the checkpoint.
        folders: Where it may be; the first one that fits counts.
        step: Optimiser steps that are done.

    Returns:
        The parts by name; empty if no file belongs to these adapters.

    Raises:
        AdapterError: A file is damaged.
    """
    digest = _digest(model)
    for path in (folder / STATE for folder in folders):
        if not path.is_file():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise AdapterError(f"{path} is damaged ({str(error)[:200]}); resume from another checkpoint") from error
        if not _is_state(state):
            raise AdapterError(f"{path} has another form than a run writes; resume from another checkpoint")
        if (state["step"], state["adapters"]) == (step, digest):
            found: Mapping[str, Any] = state
            return found
    return {}


def _is_state(value: Any) -> bool:
    return (
        is_named(value)
        and is_annealing(value.get("annealing"))
        and is_recorded(value.get("recorded"))
        and is_named(value.get("logged"), is_number)
        and ("allocation" not in value or is_allocation(value["allocation"]))
        and {"step", "adapters"} <= value.keys()
    )


def _digest(model: nn.Module) -> int:
    """A checksum of the values of all adapters."""
    digest = 0
    for name, adapter in adapters(model):
        for key, tensor in adapter.adapter_tensors().items():
            digest = zlib.crc32(f"{name}.{key}".encode(), digest)
            digest = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), digest)
    return digest
