"""One thread: tiny layers gain nothing from more, and lose much on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    """LightningCLI warns when it is given arguments and the process has some too."""
    monkeypatch.setattr("sys.argv", ["vision"])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Whatever is written without a folder lands in a temporary one."""
    monkeypatch.chdir(tmp_path)
