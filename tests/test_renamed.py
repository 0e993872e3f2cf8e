"""Old names of modules stay importable, as recipes and checkpoints hold them."""

import importlib
import subprocess
import sys

import pytest
from jsonargparse._util import import_object

from lit_adapters.renamed import CLASSES, MODULES, current, recorded


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_the_old_name_is_the_new_module(old, new):
    module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == module.__spec__.name == new


@pytest.mark.parametrize(("old", "new"), CLASSES.items())
def test_the_old_path_leads_to_the_new_class(old, new):
    assert import_object(old) is import_object(new)
    assert (current(old), recorded(new)) == (new, old)


def test_a_class_of_a_moved_module():
    assert current("language.validation.ChoiceValidation") == "language.evaluate.validation.ChoiceValidation"
    assert current("vision.module.ViTClassifier") == "vision.module.ViTClassifier"


@pytest.mark.slow
def test_a_command_runs_under_its_old_name():
    line = [sys.executable, "-m", "language.speculative", "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "--ckpt" in shown
