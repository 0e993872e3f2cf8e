"""What a person sees of a command line."""

import logging
import re
import warnings

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_adapters import AdapterCallback, AdapterError, AssetError, DataError
from lit_adapters.console import one_line
from lit_adapters.lightning.cli import run
from tests.lightning.tiny_task import Task, fit

UNION = """Parser key "model.adapters":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'Method'>, list[Method], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lit_adapters.NoRA':
        Option 'grups' is not accepted
    - Problem with given class_path 'lit_adapters.NoRA':
        Option 'grups' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'grups': 3}"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            UNION,
            "Parser key \"model.adapters\": Problem with given class_path 'lit_adapters.NoRA': "
            "Option 'grups' is not accepted",
        ),
        ("two:\n  lines\n  more", "two: lines; more"),
        ("key:\n  Expected a <class 'int'>\n  Given value: many", "key: Expected a <class 'int'>; Given value: many"),
        (AdapterError("one"), "one"),
    ],
)
def test_one_line(message, line):
    assert one_line(message) == line


@pytest.fixture
def quiet():
    """Undo what `run` sets up for its process."""
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(chatter.filters)
    with warnings.catch_warnings():
        yield chatter
    chatter.filters[:] = before


@pytest.mark.parametrize("kind", [AdapterError, DataError, AssetError, MisconfigurationException])
def test_bad_input_ends_with_one_line(quiet, kind):
    def main():
        raise kind("no such thing,\ngive another")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == "error: no such thing, give another"


def test_other_errors_keep_their_traceback(quiet):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_advertisements_are_dropped_and_other_messages_are_not(quiet, caplog):
    def main():
        rank_zero_info("💡 Tip: buy something")
        rank_zero_info("nora  6 modules")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, logger=quiet.name):
        warnings.simplefilter("always")
        run(main)
    assert [str(w.message) for w in caught] == ["something else"]
    assert caplog.messages == ["nora  6 modules"]


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (lambda: [AdapterCallback(), AdapterCallback()], r"stateful callback of type `AdapterCallback`.*keep one"),
        (
            lambda: [AdapterCallback(), EarlyStopping("no/such")],
            r"metric `no/such`.*; change `monitor` of the callback",
        ),
        (lambda: [AdapterCallback(), ModelCheckpoint(monitor="no/such")], r"no/such"),
    ],
)
def test_mistakes_that_lightning_finds(tmp_path, callbacks, words, quiet):
    with pytest.raises(SystemExit) as end:
        run(lambda: fit(tmp_path, Task(), *callbacks()))
    assert re.search(rf"^error: .*{words}", end.value.code)
    assert "\n" not in end.value.code
