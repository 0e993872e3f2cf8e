"""Language models in GGUF files, converted once to the directory that transformers loads in a second."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_adapters.errors import AdapterError, AssetError
from lit_adapters.ops.folders import cache_folder, private_folder

logger = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The directory with the model and tokenizer of a GGUF file, in safetensors and float32.

    Made at the first call, kept in `$LIT_ADAPTERS_CACHE/gguf` (else `~/.cache/lit_adapters/gguf`), and made anew when
    the file changes. It takes four bytes a parameter. Reading GGUF itself takes transformers about a minute for
    135M parameters, and a model read that way cannot be saved. The converted model has bit-identical logits.

    Raises:
        AssetError: The file is missing or torn, transformers cannot convert its architecture, or the cache belongs to
            another user.
        AdapterError: The packages that read GGUF are not installed.
    """
    if not file.is_file():
        raise AssetError(f"no model file {str(file)!r}: give a path, a package:// address or a name of the model hub")
    found = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    root = _private_root()
    folder = root / f"{file.stem[:100]}-{key}"
    if _is_own(folder):
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise AdapterError(f"{file.name!r} needs the package {package!r}: run pip install 'lit-adapters[language]'")
    with FileLock(root / f"{folder.name}.lock", mode=0o600):
        if not _is_own(folder):
            logger.info("converting %s, once", file.name)
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder.name}.") as work:
                _convert(file, Path(work) / "model")
                # Last, so that a directory of this name is whole.
                os.replace(Path(work) / "model", folder)
    return folder


def _private_root() -> Path:
    """The folder of converted models, which nobody else can write to.

    Raises:
        AssetError: It cannot be made, or belongs to another user.
    """
    try:
        return private_folder(cache_folder() / "gguf")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise AssetError(
            f"converted models cannot be kept ({error}): set LIT_ADAPTERS_CACHE to a folder of your own"
        ) from error


def _is_own(folder: Path) -> bool:
    """Whether a converted model is there that this user, or root, has put there.

    Raises:
        AssetError: Another user's, or a link, is in its place.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(found.st_mode) or (os.name == "posix" and found.st_uid not in (os.geteuid(), 0)):
        raise AssetError(f"{folder} is no folder of this user, and its model may be anybody's: remove it")
    return True


def _convert(file: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # numpy, struct, transformers: each raises its own
        raise AssetError(f"{str(file)!r} is not a GGUF language model that transformers can read: {error}") from error
    config = loaded.config
    del config.quantization_config  # with it transformers takes the model for a quantised one, which it will not save
    plain: Any = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for written in folder.iterdir():
        with written.open("rb") as content:
            os.fsync(content.fileno())
