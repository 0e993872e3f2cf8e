"""What the tests of the application share: finished runs of the smoke recipes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.vision.image_folders import write_folder
from tests.vision.smoke import SmokeRun, checkpoint, command


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    """LightningCLI warns when it is given arguments and the process has some too."""
    monkeypatch.setattr("sys.argv", ["vision"])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Whatever is written without a folder lands in a temporary one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """Fit a smoke recipe and test its last checkpoint, once for all tests: `smoke_run("nora")`."""

    @functools.cache
    def run(arm: str) -> SmokeRun:
        root = tmp_path_factory.mktemp(arm)
        fitted = command("fit", f"smoke/{arm}", root)
        return SmokeRun(fitted, command("test", f"smoke/{arm}", root, f"--ckpt_path={checkpoint(fitted)}"))

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 20 training and 4 test images of each of three classes."""
    return write_folder(tmp_path)
