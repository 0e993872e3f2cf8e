"""`load_from_checkpoint` for files that may come from someone else."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import UNREADABLE, read_checkpoint_file
from lit_adapters.files.checkpoint_schema import check_checkpoint
from lit_adapters.training.hyperparameters import BUILDERS, KEY, arguments_from, check_trust

_LONGEST = 500  # characters


class LoadsFromFiles(LightningModule):
    """A LightningModule whose checkpoints are checked before anything is built from them.

    Attributes:
        fixed_by_weights: Names of arguments that must be those of the training, as its weights fit no other values.
    """

    fixed_by_weights: ClassVar[frozenset[str]] = frozenset({"adapters", "train"})

    @classmethod
    def from_file(cls, checkpoint: dict[str, Any], path: str | Path, given: Iterable[str] = ()) -> dict[str, Any]:
        """The arguments of the constructor that a checkpoint holds, in plain form.

        Args:
            checkpoint: As it was read, with weights_only.
            path: The file, for messages.
            given: Names of arguments that the user gives; the file's are not looked at.

        Raises:
            AdapterError: A value is not plain, has another type than the argument, or names what is neither ours nor
                imported; or the file says how to build the module.
        """
        found = arguments_from(cls, checkpoint, path, given)
        if any(key in checkpoint.get(KEY, {}) for key in BUILDERS):
            raise AdapterError(
                f"{str(path)!r} says how its module is to be built, as no run of {cls.__name__} writes it; it was "
                "changed after training: take another checkpoint"
            )
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module`'s.

        Raises:
            AdapterError: Names or shapes are not those of this module.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except AdapterError:
            raise
        except RuntimeError as error:
            raise AdapterError(
                f"the weights of the checkpoint do not fit this {type(self).__name__}: {_short(error)}; give the "
                "settings that it was trained with"
            ) from error

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Lightning's; the file holds tensors and plain values, or is refused.

        Args:
            checkpoint_path: Path, address or open file of the checkpoint.
            map_location: Where the tensors go.
            hparams_file: Hyperparameters that replace those of the checkpoint, .yaml or .csv.
            strict: Whether the keys of the checkpoint must be those of the module.
            weights_only: False trusts the file: it may then run any code, and nothing of it is checked.
            kwargs: Arguments of the constructor, in place of the checkpoint's.

        Raises:
            AdapterError: The file is torn, holds what is not plain, names what is neither ours nor imported, or does
                not fit the module.
        """
        parent = super().load_from_checkpoint
        if weights_only is False:
            return parent(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)
        source, checkpoint = _read(checkpoint_path)
        name = checkpoint_path if isinstance(checkpoint_path, (str, Path)) else "the checkpoint"
        if hparams_file is not None:
            read = load_hparams_from_tags_csv if str(hparams_file).lower().endswith("csv") else load_hparams_from_yaml
            checkpoint = {**checkpoint, KEY: read(hparams_file)}
        check_trust(kwargs)
        cls.from_file(checkpoint, name, kwargs)
        try:
            return parent(source, map_location, hparams_file, strict, True, **kwargs)
        except AdapterError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise AdapterError(
                f"{str(name)!r} cannot be loaded as a {cls.__name__}: {type(error).__name__}: {_short(error)}"
            ) from error


def _short(error: Exception) -> str:
    """What an error says, without the end of a list of all tensors."""
    text = one_line(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _read(source: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint with weights_only, and what it can be read from once more."""
    if isinstance(source, (str, Path)) and "://" not in str(source):
        if not Path(source).is_file():
            raise AdapterError(f"{str(source)!r} does not exist; give a checkpoint that a fit has written")
        return source, read_checkpoint_file(source)
    try:
        content = _load(source, map_location="cpu", weights_only=True)
    except (*UNREADABLE, OSError) as error:
        raise AdapterError(f"the checkpoint cannot be read as tensors and plain values: {one_line(error)}") from error
    check_checkpoint(content, "the checkpoint")
    again = io.BytesIO()
    torch.save(content, again)
    again.seek(0)
    return again, content
