"""Command lines: options from a typed function, tables, and on bad input one line on stderr with exit status 1."""

from __future__ import annotations

import atexit
import gc
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lit_adapters.errors import AdapterError

T = TypeVar("T")

_LONG = 800  # characters of a line of a message
_WIDEST = 1 << 20  # characters of a line: more than any table has

# How jsonargparse tells that a value fitted none of several types; the reasons stand between these lines.
_FRAME = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Expected a <class '(NoneType|list)'>|Given value type:"
    r"|Given value: .*[({]"  # a whole section, whose key is named already
)


def one_line(message: object) -> str:
    """A message without line breaks, repetitions, long values and jsonargparse's frame around the reasons."""
    lines = [line.strip().removeprefix("- ") for line in str(message).splitlines()]
    kept = [line for line in dict.fromkeys(lines) if line and not _FRAME.match(line)]
    return re.sub(r"([:;,.]);", r"\1", "; ".join(_cut(line) for line in kept))


def _cut(line: str) -> str:
    """The beginning and the end of a line that a value makes long."""
    return line if len(line) <= _LONG else f"{line[: _LONG // 2]} ... {line[-_LONG // 4 :]}"


def call(function: Callable[..., T], args: Sequence[str] | None, prog: str) -> T:
    """Call a function with the arguments of a command line.

    Each parameter is an option, typed by its annotation and explained by the docstring; a parameter without a default
    is required. Where the function passes `**kwargs` on to another one, the other one's parameters are options too.

    Args:
        function: What to call; its docstring is also the description of the command.
        args: The arguments; `sys.argv[1:]` by default.
        prog: How the command is called, such as "python -m language.evaluate".

    Raises:
        AdapterError: An argument is unknown, missing or not of its type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(function)
    for action in parser._actions:
        if action.default is False and action.nargs is None:
            action.nargs, action.const = "?", True  # `--flag` alone means true
    try:
        values = parser.parse_args(args)
    except ArgumentError as error:
        raise AdapterError(f"{one_line(error)} ({prog} --help lists what it takes)") from error
    return function(**values.as_dict())


def text_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of aligned columns, as wide as their cells whatever the terminal: a pipe or a file gets all of them.

    Args:
        rows: The cells; the first row is the heading.
        right: The numbers of the columns that are aligned on the right.
    """
    from rich.console import Console
    from rich.table import Table

    heading, *others = rows
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index in right else "left", no_wrap=True)
    for row in others:
        table.add_row(*row)
    written = io.StringIO()
    Console(file=written, width=_WIDEST, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def run(main: Callable[[], Any], *errors: type[Exception]) -> None:
    """Run a command line; an `AdapterError`, or one of `errors`, ends it with one line and exit status 1.

    If Python's collection of garbage is disabled, as a program may do while it imports, this enables it.
    """
    if not gc.isenabled():
        gc.freeze()  # what is imported stays, and need not be looked through again
        gc.enable()
    # Python would look through everything for garbage before it ends, which takes a second.
    atexit.register(gc.freeze)
    ended_by: tuple[type[Exception], ...] = (AdapterError, *errors)
    try:
        main()
    except ended_by as error:
        sys.exit(f"error: {one_line(error)}")
