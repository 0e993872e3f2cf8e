"""Rewards: what counts as the right number or form, and that a bad function is named."""

from __future__ import annotations

import pytest
import torch

import lit_adapters as la
from language.grpo.rewards import Reward, Rewards, brevity, exact_number, marked_number, number_only
from tests.language.grpo.rewarding import term


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("7", "7", True),
        ("3 + 4 = 7.", "7", True),
        ("7 apples, not 8", "7", False),
        ("it is 1,200", "1200.0", True),
        ("so -5", "3 - 8 = -5. #### -5", True),
        ("12-5", "5", True),  # a difference, not a negative number
        ("#### 42\nQ: 17", "42", True),
        ("#### none", "42", False),
        ("#### 4.20", "4.2", True),
        ("", "0", False),
        ("x7", "7", False),
        ("it is \u22125", "-5", True),  # the minus sign, as models write it
        ("5 \u2212 3 = 2", "2", True),
        ("5\u22123", "3", True),
        ("a loss of -$5", "-5", True),
        ("a loss of $-5", "-5", True),
        (r"costs \$1,234.50", "1234.5", True),
        (".50", "0.5", True),
        ("x = -.5", "-0.5", True),
        ("v1.50", "0.5", False),
        ("1{,}234", "1234", True),
        ("1{,}234", "234", False),
        ("4,2", "42", False),  # commas stand between thousands alone
        ("reason 3. #### 2,400", "1,200 * 2 = 2,400. #### 2,400", True),
    ],
)
def test_exact_number(completion, answer, right):
    assert exact_number(completion, answer) == float(right)


def test_forms():
    assert [number_only(text, "") for text in (" 12", "-3.5\n", "1,200", "12.", "1 2", "", "42,,,")] == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    texts = ("a\n#### 7", "#### 7 ", "#### 7\nb", "#### 7\n#### 7", "7", "####")
    assert [marked_number(text, "") for text in texts] == [1, 1, 0, 0, 0, 0]
    assert [brevity(text, "1234") for text in ("", "12", "1234", "12345678")] == [0, 1, 1, 0.5]


def test_the_weighted_sum():
    rewards = Rewards(
        [Reward("language.rewards.exact_number"), {"function": "language.rewards.number_only", "weight": 3}]
    )
    parts = rewards(["7", "is 7", "8"], ["7"] * 3)
    assert rewards.names == ["exact_number", "number_only"]
    assert torch.equal(parts, torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(parts @ rewards.weights, torch.tensor([4.0, 1.0, 3.0]))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "rewards is empty"),
        (["missing"], r"no reward function 'tests\.language\.grpo\.rewarding\.missing'"),
        (["NOT_A_FUNCTION"], "is not a function"),
        (["letters", "letters"], "two metrics would be called 'letters'"),
        (["reward"], "two metrics would be called 'reward'"),
    ],
)
def test_terms_that_are_refused(names, words):
    with pytest.raises(la.AdapterError, match=words):
        Rewards([term(name) for name in names])


@pytest.mark.parametrize("path", ["letters", "", "no.such.module.letters"])
def test_paths_that_lead_nowhere(path):
    with pytest.raises(la.AdapterError, match="no reward function"):
        Rewards([Reward(path)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_a_number", "reward 'not_a_number' is nan for completion 'abc', answer '7': return a finite number"),
        ("broken", "reward 'broken' failed on completion 'abc', answer '7': KeyError: 'no key'"),
    ],
)
def test_functions_that_fail(name, words):
    with pytest.raises(la.AdapterError, match=words):
        Rewards([term(name)])(["abc"], ["7"])


def test_an_answer_without_a_number():
    with pytest.raises(la.AdapterError, match=r"reward 'exact_number' failed .* the answer 'seven' has no number"):
        Rewards([Reward("language.rewards.exact_number")])(["7"], ["seven"])
