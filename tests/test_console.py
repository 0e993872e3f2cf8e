"""Command lines from typed functions, and tables of text."""

from __future__ import annotations

import atexit
import gc
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lit_adapters.console import call, run, text_table


@dataclass(frozen=True)
class Settings:
    """How to do it.

    Args:
        shots: Examples in a prompt.
        temperatures: All of them.
    """

    shots: int = 5
    temperatures: tuple[float, ...] = (0.0, 1.0)


def command(
    *, file: Path, short: bool = False, kind: Literal["a", "b"] | None = None, **settings: Any
) -> tuple[Path, bool, str | None, Settings]:
    """Do it.

    Args:
        file: What to read.
        short: Whether to stop early.
        kind: The kind.
        settings: Those of `Settings`.
    """
    return file, short, kind, Settings(**settings)


def test_options_are_those_of_the_function():
    assert call(command, ["--file=x"], "do") == (Path("x"), False, None, Settings())
    arguments = ["--file", "x", "--short", "--kind=b", "--shots=2", "--temperatures=[0.5]"]
    assert call(command, arguments, "do") == (Path("x"), True, "b", Settings(2, (0.5,)))
    assert call(command, ["--short=false", "--file=x"], "do")[1] is False
    assert call(command, ["--short", "true", "--file=x"], "do")[1] is True


def test_help_is_that_of_the_docstrings(capsys):
    with pytest.raises(SystemExit) as end:
        call(command, ["--help"], "python -m do")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m do")
    for words in ("Do it", "What to read", "Whether to stop early", "Examples in a prompt"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: file"),
        (["--file=x", "--fil=y"], "unrecognized arguments: --fil=y"),
        (["--file=x", "--kind=c"], "kind"),
        (["--file=x", "--shots=many"], "shots"),
        (["--file=x", "--temperatures=[hot]"], "temperatures"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, words):
    with pytest.raises(SystemExit) as end:
        run(lambda: call(command, arguments, "do"))
    assert end.value.code.startswith("error: ")
    assert words in end.value.code
    assert "(do --help lists what it takes)" in end.value.code
    assert "\n" not in end.value.code


def test_a_table_is_aligned_and_never_cut():
    lines = text_table([("name", "n"), ("[x] :y:" + "z" * 300, "1,000"), ("b", "2")], right=(1,)).split("\n")
    assert lines[0].split() == ["name", "n"]
    assert lines[1] == "[x] :y:" + "z" * 300 + "  1,000"
    assert lines[2].startswith("b ")
    assert len({len(line) for line in lines}) == 1


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    frozen, enabled = [], []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(atexit, "register", lambda function: None)
    gc.disable()
    try:
        run(lambda: enabled.append(gc.isenabled()))
    finally:
        gc.enable()
    assert frozen == [False]
    assert enabled == [True]
    run(lambda: None)
    assert frozen == [False]  # what a process has made since stays collectable


@pytest.mark.parametrize("module", ["vision", "language", "language.dpo"])
def test_a_program_that_is_imported_leaves_the_collection_of_garbage_on(module):
    importlib.import_module(f"{module}.__main__")
    assert gc.isenabled()
