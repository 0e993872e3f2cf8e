"""Verifiable rewards: plain functions of a completion and the reference answer, named in YAML.

    rewards:
      - {function: language.grpo.rewards.exact_number, weight: 1.0}
      - {function: my_file.my_reward, weight: 0.2}

A function takes `(completion: str, answer: str)`, the text after the prompt without special tokens and the row's
answer as it is written, and returns a number.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lit_adapters.class_paths import find_imported
from lit_adapters.errors import AdapterError, shown
from lit_adapters.values import check_number

MARK = "####"  # before the answer in GSM8K (arXiv 2110.14168)

_TAKEN = {"reward", "reward_std", "loss", "kl", "clip_fraction", "completion_length", "zero_advantage"}  # other metrics

# A sign (that of the keyboard, or U+2212) belongs to the number unless something to subtract from stands before it.
_SIGN = r"(?<![\w.])[-+\u2212]?"
_DIGITS = r"(?:(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.\d+)?|\.\d+)"  # thousands may stand apart as in LaTeX, 1{,}000
_NUMBER = _SIGN + _DIGITS
_AMOUNT = rf"{_SIGN}(?:\\?[$\u20ac\u00a3\u00a5])?{_DIGITS}"  # a currency may stand between, as in -$5


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or without one the last number of a text; None where there is none.

    -5, \u22125 (with the minus sign U+2212), -$5 and $-5 are -5; 1,000 and LaTeX's 1{,}000 are 1000; .5 is 0.5.
    """
    _, mark, marked = text.rpartition(MARK)
    numbers = re.findall(_AMOUNT, marked)
    if not numbers:
        return None
    return Decimal(re.sub(r"[^-+.\d]", "", (numbers[0] if mark else numbers[-1]).replace("\u2212", "-")))


def exact_number(completion: str, answer: str) -> float:
    """1 if the final number of a completion is that of the answer, else 0; 42, 42.0 and "#### 42" are equal.

    Raises:
        ValueError: The answer has no number.
    """
    expected = final_number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} has no number")
    return float(final_number(completion) == expected)


def number_only(completion: str, answer: str) -> float:
    """1 if a completion is a number and nothing else, else 0."""
    return float(re.fullmatch(_NUMBER, completion.strip()) is not None)


def marked_number(completion: str, answer: str) -> float:
    """1 if the last line of a completion is `#### number`, the only mark in it, else 0."""
    last = completion.rstrip().rpartition("\n")[2]
    return float(completion.count(MARK) == 1 and re.fullmatch(rf"{MARK} ?{_NUMBER}", last) is not None)


def brevity(completion: str, answer: str) -> float:
    """1 for a completion of at most as many characters as the answer, their ratio for a longer one, 0 for none."""
    written = len(completion.strip())
    return min(1.0, len(answer) / written) if written else 0.0


@dataclass
class Reward:
    """One term of the reward.

    Args:
        function: Import path of a function `(completion, answer) -> float`.
        weight: Factor of the term in the sum.
    """

    function: str
    weight: float = 1.0


class Rewards:
    """The weighted sum of reward functions.

    Args:
        rewards: The terms, as `Reward` or as dictionaries with its fields.

    Raises:
        AdapterError: The list is empty, a term has no function or a weight that is not finite, all weights are 0, a
            function cannot be imported, or two metrics would have the same name.
    """

    def __init__(self, rewards: Sequence[Reward | Mapping[str, Any]]) -> None:
        self.terms = [_term(reward) for reward in rewards]
        self._functions = {_name(term.function): _imported(term.function) for term in self.terms}
        self.weights = torch.tensor([float(term.weight) for term in self.terms], dtype=torch.float32)
        if not self.terms:
            raise AdapterError(
                "rewards is empty: name at least one function, such as language.grpo.rewards.exact_number"
            )
        if not self.weights.any():
            raise AdapterError("the weights of all rewards are 0: give one of them another weight, such as 1.0")
        names = [_name(term.function) for term in self.terms]
        for name in names:
            if names.count(name) > 1 or name in _TAKEN:
                raise AdapterError(f"two metrics would be called {name!r}: rename one of the reward functions")

    @property
    def names(self) -> list[str]:
        """Names of the functions, without their modules."""
        return list(self._functions)

    def __call__(self, completions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """What each function says of each completion, float32 (N, functions); `@ weights` is the reward.

        Raises:
            AdapterError: A function raised an error, or did not return a finite number.
        """
        pairs = list(zip(completions, answers, strict=True))
        values = [[self._value(name, *pair) for name in self._functions] for pair in pairs]
        return torch.tensor(values, dtype=torch.float32)  # whatever the precision of the training

    def _value(self, name: str, completion: str, answer: str) -> float:
        try:
            value = float(self._functions[name](completion, answer))
        except Exception as error:  # whatever a user's own code raises
            raise AdapterError(
                f"reward {name!r} failed on completion {completion!r}, answer {answer!r}: "
                f"{type(error).__name__}: {error}; correct the function or the row"
            ) from error
        if not math.isfinite(value):
            raise AdapterError(
                f"reward {name!r} is {value} for completion {completion!r}, answer {answer!r}: return a finite number"
            )
        return value


def _term(reward: Any) -> Reward:
    if isinstance(reward, Mapping):
        unknown = sorted(map(str, reward.keys() - {"function", "weight"}))
        if unknown or "function" not in reward:
            raise AdapterError(
                f"a reward has the fields {shown(sorted(map(str, reward)))}: it takes function and weight"
            )
        reward = Reward(**reward)
    if not isinstance(reward, Reward) or not isinstance(reward.function, str):
        raise AdapterError(f"the reward {shown(reward)} must have the import path of a function, as text")
    check_number(f"the weight of {shown(reward.function)}", reward.weight, -1e6, 1e6)
    return reward


def is_known(path: str) -> bool:
    """Whether a path names a reward function of a module that has been imported: a function of (completion, answer)."""
    found = find_imported(path)
    return isinstance(found, FunctionType) and list(inspect.signature(found).parameters)[:2] == ["completion", "answer"]


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _imported(path: str) -> Callable[[str, str], float]:
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdapterError(
            f"no reward function {path!r} ({error}): give an import path such as language.grpo.rewards.exact_number"
        ) from error
    if not callable(function):
        raise AdapterError(f"reward {path!r} is not a function; give one that takes (completion, answer)")
    return function
