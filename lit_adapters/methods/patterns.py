"""Matching of regular expressions that ends in time for every pattern: someone may write a file to make loading hang.

Python's `re` tries one way through a pattern after the other, and nested repeats such as `(a+)+b` have exponentially
many. Patterns with few ways go to `re`. For the others, the ends of all matches from one place are found together,
which takes a time polynomial in the length of the name.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

from lit_adapters.errors import AdapterError, shown

if sys.version_info >= (3, 11):
    from re import _compiler, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_parse as _parser

_USUAL_LENGTH = 64  # of a name
_FEW_WAYS = 8 * _USUAL_LENGTH**3  # three long repeats and a few choices
_LONGEST = 2000  # characters of a pattern that is not given to `re`
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "IN", "ANY")


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a whole name.

    Raises:
        AdapterError: It is not a regular expression, or one that might take too long: with back-references, conditions
            or possessive groups beside nested or many repeats, or with these and longer than 2,000 characters.
    """
    return _matcher(pattern)(name)


def check_few_ways(name: str, pattern: str) -> None:
    """Check that `re` is fast with a pattern, where a library matches it instead of `fullmatch`.

    Args:
        name: The setting, for the message.
        pattern: The regular expression.

    Raises:
        AdapterError: It is not a regular expression, or has nested repeats or many.
    """
    if not _has_few_ways(_parsed(pattern)):
        raise AdapterError(
            f"{name} {shown(pattern)} has repeats in each other, or many, which may take for ever; give a list of names"
        )


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Callable[[str], bool]:
    tree = _parsed(pattern)
    if _has_few_ways(tree):
        compiled = re.compile(pattern)
        return lambda name: compiled.fullmatch(name) is not None
    if len(pattern) > _LONGEST or not _is_regular(tree):
        raise AdapterError(
            f"the pattern {shown(pattern)} may take for ever: it has repeats in each other, or many, and has "
            f"back-references or more than {_LONGEST} characters; give a list of names"
        )
    return _AllWays(tree).fullmatch


def _parsed(pattern: str) -> Any:
    try:
        re.compile(pattern)
        return _parser.parse(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{shown(pattern)} is not a regular expression ({error}); name suffixes go in a list"
        ) from error


def _parts(item: Any) -> list[Any]:
    """The patterns inside an item of a parsed pattern."""
    operation, value = item[0].name, item[1]
    if operation == "BRANCH":
        return list(value[1])
    if operation == "GROUPREF_EXISTS":
        return [part for part in value[1:] if part is not None]
    if operation == "ATOMIC_GROUP":
        return [value]
    if operation in (*_REPEATS, "POSSESSIVE_REPEAT", "SUBPATTERN"):
        return [value[-1]]
    return [value[1]] if operation in ("ASSERT", "ASSERT_NOT") else []


def _items(tree: Iterable[Any]) -> Iterable[Any]:
    for item in tree:
        yield item
        for part in _parts(item):
            yield from _items(part)


def _has_few_ways(tree: Any) -> bool:
    return _ways(tree) <= _FEW_WAYS


def _ways(tree: Any) -> float:
    """An upper bound of the ways in which a pattern matches at one place of a name of usual length."""
    ways = 1.0
    for item in tree:
        operation, value = item[0].name, item[1]
        inner = [_ways(part) for part in _parts(item)]
        if operation in (*_REPEATS, "POSSESSIVE_REPEAT"):
            least, most, body = value
            if most <= 1:
                ways *= 1 + inner[0]
            elif len(body) == 1 and body[0][0].name in _ONE_CHARACTER:
                ways *= min(most - least + 1, _USUAL_LENGTH)
            else:
                return math.inf
        elif operation == "BRANCH":
            ways *= sum(inner)
        else:
            ways *= max(inner, default=1.0)
    return ways


def _is_regular(tree: Any) -> bool:
    """Whether `_AllWays` can match a pattern: it has no back-references, conditions, atomic or possessive groups."""
    known = (*_ONE_CHARACTER, *_REPEATS, "BRANCH", "SUBPATTERN", "AT")
    return all(item[0].name in (*known, "ASSERT", "ASSERT_NOT") for item in _items(tree))


class _AllWays:
    """Finds the ends of all matches of a parsed pattern together."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.single: dict[tuple[int, int], re.Pattern[str]] = {}

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches the whole name.

        Raises:
            AdapterError: Groups are nested too deeply.
        """
        self.name = name
        self.known: dict[tuple[int, int, int], frozenset[int]] = {}
        try:
            return len(name) in self._sequence(self.tree, 0, self.tree.state.flags)
        except RecursionError as error:
            raise AdapterError("the pattern has too many groups in each other; give a list of names") from error

    def _sequence(self, items: Any, start: int, flags: int) -> frozenset[int]:
        ends = frozenset([start])
        for item in items:
            ends = self._union(partial(self._item, item, flags), ends)
            if not ends:
                break
        return ends

    def _item(self, item: Any, flags: int, start: int) -> frozenset[int]:
        key = (id(item), start, flags)
        if key not in self.known:
            self.known[key] = self._computed(item, start, flags)
        return self.known[key]

    def _computed(self, item: Any, start: int, flags: int) -> frozenset[int]:
        operation, value = item[0].name, item[1]
        if operation == "BRANCH":
            return self._union(lambda part: self._sequence(part, start, flags), value[1])
        if operation == "SUBPATTERN":
            _, added, removed, part = value
            return self._sequence(part, start, (flags | added) & ~removed)
        if operation in _REPEATS:
            least, most, body = value
            return self._repeated(least, most, body, start, flags)
        if operation in ("ASSERT", "ASSERT_NOT"):
            direction, part = value
            if direction > 0:
                found = bool(self._sequence(part, start, flags))
            else:
                found = any(start in self._sequence(part, begin, flags) for begin in range(start + 1))
            return frozenset([start]) if found == (operation == "ASSERT") else frozenset()
        found_one = self._compiled(item, flags).match(self.name, start)
        return frozenset([found_one.end()]) if found_one else frozenset()

    def _repeated(self, least: int, most: int, body: Any, start: int, flags: int) -> frozenset[int]:
        def once(places: frozenset[int]) -> frozenset[int]:
            return self._union(lambda place: self._sequence(body, place, flags), places)

        places = frozenset([start])
        for _ in range(least):
            before, places = places, once(places)
            if places == before:  # also when there are none left
                break
        reached = new = places
        for _ in range(most - least):
            new = once(new) - reached
            if not new:
                break
            reached |= new
        return reached

    @staticmethod
    def _union(ends: Callable[[Any], frozenset[int]], starts: Iterable[Any]) -> frozenset[int]:
        return frozenset().union(*map(ends, starts))

    def _compiled(self, item: Any, flags: int) -> re.Pattern[str]:
        """An item that is one character or a place, compiled by itself."""
        key = (id(item), flags)
        if key not in self.single:
            one = _parser.SubPattern(self.tree.state, [item])
            self.single[key] = _compiler.compile(one, flags)
        return self.single[key]
