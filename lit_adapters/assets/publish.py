"""Describes adapters with a card and a picture, and puts them on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError, AssetError
from lit_adapters.files.adapters import read_directory, save_adapters
from lit_adapters.files.atomic import write_together
from lit_adapters.files.base_name import is_repository
from lit_adapters.files.card import CARD, card, is_generated, may_write_card
from lit_adapters.files.hub import require_hub
from lit_adapters.files.saved import read_saved
from lit_adapters.learned import summary

PICTURE = "learned.png"


def write_card(
    directory: str | Path,
    *,
    license: str | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write the model card of an adapter directory anew, with a picture of what was learned.

    `save_adapters` writes a card without the picture, as it may be called at each checkpoint and drawing takes time.

    Args:
        directory: What `save_adapters` wrote.
        license: Of the adapters, as the hub calls it ("apache-2.0").
        data: What they were trained on, in a sentence.
        metrics: Results by name.

    Raises:
        AdapterError: The directory is not one of adapters, its card was written or changed by the user, or an argument
            is not valid.
    """
    directory = Path(directory)
    header, tensors = read_directory(directory)
    if not may_write_card(directory):
        raise AdapterError(f"{directory / CARD} was written or changed by you, and stays; move it to get a new one")
    drawn = _draw(directory)
    text = card(header, tensors, license=license, data=data, metrics=metrics, picture=drawn)
    write_together(directory, {CARD: lambda path: path.write_text(text, encoding="utf-8")})


def push(
    model: nn.Module,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    license: str | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Save the adapters of `model` and upload them with a model card and a picture of what was learned.

    A card in the repository that the user has written or changed stays.

    `load_adapters(model, repository)` loads them.

    Args:
        model: The module given to `attach`.
        repository: Such as "user/name"; it is created if it does not exist.
        private: Whether a new repository is private; by default as the user's account has it.
        revision: The branch to write to; it is created if it does not exist.
        token: By default the one that the user has logged in with.
        message: Of the commit.
        license: Of the adapters, as the hub calls it ("apache-2.0"); for the card.
        data: What they were trained on, in a sentence; for the card.
        metrics: Results by name; for the card.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: The model has no adapters, an argument is not valid, or huggingface_hub is missing.
        AssetError: The hub refuses the upload or cannot be reached.
    """
    if not is_repository(repository) or "/" not in repository:
        raise AdapterError(f"repository {repository!r} must be the name of one of the hub, such as 'user/name'")
    hub = require_hub()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        save_adapters(model, directory)
        header, tensors = read_directory(directory)
        drawn = _draw(directory)
        text = card(header, tensors, repository=repository, license=license, data=data, metrics=metrics, picture=drawn)
        api = hub.HfApi(token=token, library_name="lit-adapters")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            (directory / CARD).write_text(_own_card(api, repository, revision) or text, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=directory,
                revision=revision,
                commit_message=message or f"Add adapters ({', '.join(sorted(set(header['adapters'].values())))})",
            )
        except Exception as error:  # which library's error it is depends on the version of huggingface_hub
            first = str(error).strip().partition("\n")[0][:300]
            raise AssetError(
                f"the hub did not take the adapters for {repository!r} ({type(error).__name__}: {first}); check the "
                "name, that you have logged in (hf auth login) with a token that may write, and the network"
            ) from error
    return str(commit.commit_url)


def _own_card(api: Any, repository: str, revision: str | None) -> str | None:
    """The card in the repository, if the user has written or changed it."""
    if not api.file_exists(repository, CARD, revision=revision):
        return None
    with tempfile.TemporaryDirectory() as place:  # the cache would take the newest commit for fetched as a whole
        path = api.hf_hub_download(repository, CARD, revision=revision, local_dir=place)
        text: str = Path(path).read_text(encoding="utf-8")
    return None if is_generated(text) else text


def _draw(directory: Path) -> str | None:
    """Draw what the adapters have learned; None where nothing can be told from the files."""
    from lit_adapters.learned.pictures import save_figure
    from lit_adapters.learned.plots import learned_figure

    saved = read_saved(directory)
    summaries = summary.summarise(saved)
    if all(layer.learned.change is None for layer in summaries):
        return None
    figure = learned_figure(summaries, list(summary.learned_functions(saved).values()))
    save_figure(figure, directory / PICTURE, dpi=100)
    return PICTURE
