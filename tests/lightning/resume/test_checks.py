"""How often one resume checks its checkpoint: where the file is read, and before that the recipe against it."""

from collections import Counter

import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_adapters import AdapterCallback
from lit_adapters.files import adapters as files
from lit_adapters.lightning import cli
from lit_adapters.lightning.resume import callback, checkpoint_io
from lit_adapters.training import checkpoint
from tests.lightning.resume.test_checkpoints import saver
from tests.lightning.tiny_task import Task, fit
from tests.vision.smoke import checkpoint as last
from tests.vision.smoke import command


@pytest.fixture
def counted(monkeypatch):
    """Calls of each check, by name, whoever makes them."""
    calls = Counter()

    def count(name, *modules):
        original = getattr(modules[0], name)

        def counting(*args):
            calls[name] += 1
            return original(*args)

        for module in modules:
            monkeypatch.setattr(module, name, counting)

    count("check_whole", files, checkpoint_io)
    count("check_recipe", checkpoint, cli)
    count("check_model", checkpoint, callback)
    count("_check_class", checkpoint)
    count("check_settings", checkpoint)
    return calls


def test_from_python(tmp_path, counted):
    fit(tmp_path, Task(), AdapterCallback(), saver(tmp_path))
    assert not counted
    fit(tmp_path, Task(), AdapterCallback(), ckpt=tmp_path / "kept" / "last.ckpt", max_epochs=2)
    # The settings are the methods and `train` of the one adapted model.
    assert counted == {"check_whole": 1, "check_model": 1, "_check_class": 1, "check_settings": 2}


def test_a_smoke_recipe(tmp_path, counted):
    path = last(command("fit", "smoke/lora", tmp_path))
    assert not counted
    command("fit", "smoke/lora", tmp_path, f"--ckpt_path={path}")
    # The recipe before a model is built, then the model; each reads the file.
    each = {"check_recipe": 1, "check_model": 1}
    assert counted == {**each, "check_whole": 2, "_check_class": 2, "check_settings": 3}


def test_a_file_that_the_trainer_reads_by_other_means_is_checked_by_the_hook(tmp_path, counted):
    class Own(TorchCheckpointIO):
        pass

    fit(tmp_path, Task(), AdapterCallback(), saver(tmp_path), plugins=[Own()])
    fit(tmp_path, Task(), AdapterCallback(), ckpt=tmp_path / "kept" / "last.ckpt", max_epochs=2, plugins=[Own()])
    assert counted == {"check_model": 1, "_check_class": 1, "check_settings": 2}
