"""Reading and writing of checkpoint files: whole or not at all, and checked before anything of them is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import UNREADABLE, check_whole
from lit_adapters.files.atomic import write_atomically


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of one checkpoint file, made safe.

    A local file is written beside its place, forced to disk and renamed, so a kill at any moment leaves the old one or
    the new one; Lightning's own writer fills a file in the system's temporary folder, from which a move to another file
    system is a copy. This is the one place where a checkpoint that is read is checked.

    Args:
        check: Takes the checkpoint and its path, and raises for one that does not fit.
        complete: Takes a checkpoint that passed the check, and its path, and puts back what `reduce` left out.

    Attributes:
        reduce: Takes a checkpoint when all callbacks have added to it, and returns what is written.
    """

    def __init__(
        self, check: Callable[[dict[str, Any], Any], None], complete: Callable[[dict[str, Any], Any], None]
    ) -> None:
        self._check = check
        self._complete = complete
        self.reduce: Callable[[dict[str, Any]], dict[str, Any]] = dict
        self._checked: int | None = None  # id of the checkpoint that was checked last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically."""
        checkpoint = self.reduce(checkpoint)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read and check.

        Raises:
            AdapterError: The file is torn, or `check` or `complete` refuses it.
        """
        if Path(path).is_file():
            check_whole(path)
        try:
            checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        except UNREADABLE as error:
            raise AdapterError(
                f"{str(path)!r} is torn or no checkpoint of tensors and plain values; give another one"
            ) from error
        self._check(checkpoint, path)
        self._complete(checkpoint, path)
        self._checked = id(checkpoint)
        return checkpoint

    def has_checked(self, checkpoint: dict[str, Any]) -> bool:
        """Whether this very checkpoint, still in memory, is the one that was read last."""
        return self._checked == id(checkpoint)
