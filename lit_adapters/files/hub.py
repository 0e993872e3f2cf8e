"""Adapter directories on the hub: what is fetched, from where, and what can go wrong; also without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_adapters.errors import AdapterError, AssetError
from lit_adapters.files.base_name import is_repository

PROBE_SECONDS = 5.0


@contextlib.contextmanager
def short_hub_waits(needed: bool) -> Iterator[None]:
    """Inside the block, use only the local cache if the hub does not answer within `PROBE_SECONDS`.

    Otherwise huggingface_hub, which comes with timm and transformers, would retry each file for half a minute.

    Args:
        needed: Whether to ask the hub at all.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not needed or constants.HF_HUB_OFFLINE:
        yield
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # which library's error it is depends on the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def require_hub() -> Any:
    """The package huggingface_hub.

    Raises:
        AdapterError: It is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise AdapterError(f"{error}; the hub needs `pip install huggingface_hub`") from error
    return huggingface_hub


def local_directory(
    place: str | Path, tensors: str, others: tuple[str, ...], revision: str | None, token: str | bool | None
) -> Path:
    """The directory of adapters: the given one, or what is fetched from the repository of that name.

    A repository is taken from the cache of huggingface_hub if it is there, also without a network. "runs/adapters" is
    no repository where there is a directory `runs`.

    Args:
        place: A directory, or as text the name of a repository of the hub, such as "user/name".
        tensors: The name of the file that must be there.
        others: Names of files that may be.
        revision: A branch, tag or commit of the repository.
        token: For private repositories; by default the one that the user has logged in with.

    Raises:
        AdapterError: `revision` or `token` is given for a local directory.
        AssetError: There is neither such a directory nor such a repository, the revision or the file is missing, or the
            hub cannot be reached and the cache does not have it.
    """
    local = Path(place)
    named = isinstance(place, str) and is_repository(place) and "/" in place
    if not named or local.exists() or local.parent.is_dir():  # else a slip in a path would fetch a stranger's file
        if revision is not None or token is not None:
            raise AdapterError(f"revision and token are for repositories of the hub, and {str(place)!r} is a directory")
        return local
    hub = require_hub()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {"repo_id": place, "revision": revision, "token": token, "library_name": "lit-adapters"}
    try:
        with short_hub_waits(needed=True):
            path = hub.hf_hub_download(filename=tensors, **where)
            for name in others:
                with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):  # the tensor file is complete
                    hub.hf_hub_download(filename=name, **where)
    except Exception as error:  # which library's error it is depends on the version of huggingface_hub
        first = str(error).strip().partition("\n")[0][:300]
        at = f" at revision {revision!r}" if revision else ""
        raise AssetError(
            f"{place!r} is not a directory here, and the hub did not give {tensors} of a repository of that name{at} "
            f"({type(error).__name__}: {first}); check the name, the revision and the token, or the network"
        ) from error
    return Path(path).parent
