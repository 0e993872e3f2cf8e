"""A tuner from a checkpoint that a command line has written."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from language.module import CausalLMTuner
from lit_adapters.checkpoint import check_whole
from lit_adapters.errors import AdapterError

Tuner = TypeVar("Tuner", bound=CausalLMTuner)


def load_tuner(path: Path, kind: type[Tuner], command: str) -> Tuner:
    """The tuner on the CPU.

    Args:
        path: what --ckpt was given.
        kind: its class.
        command: the module whose `fit` writes such checkpoints.

    Raises:
        AdapterError: the file is missing, torn or another class's.
    """
    if not path.is_file():
        raise AdapterError(f"--ckpt {str(path)!r} does not exist; give a file that a fit has written")
    check_whole(path, "--ckpt ")
    try:
        return kind.load_from_checkpoint(path, map_location="cpu")
    except AdapterError:
        raise
    except (RuntimeError, KeyError, TypeError) as error:
        raise AdapterError(f"--ckpt {str(path)!r} is no checkpoint of `python -m {command} fit`: {error}") from error
