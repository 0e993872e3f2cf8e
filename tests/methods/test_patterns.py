"""Regular expressions on names: what `re` says, and in time for any pattern."""

import itertools
import re
import time

import pytest
from torch import nn

import lit_adapters as la
from lit_adapters.methods.patterns import _AllWays, _has_few_ways, _is_regular, _parsed, fullmatch
from lit_adapters.methods.targets import matches

NAMES = ["", "a", "b", "aa", "ab", "aab", "abab", "model.layers.11.mlp.fc1", "model.layers.1.attn.q_proj", "a.b.c", "A"]
PATTERNS = [
    "a*",
    "(a|b)*",
    "(a+)+b",
    "(a|a)*b",
    "(?:a|ab)*b?",
    "a{2}",
    "(ab){1,2}",
    "(a*)*b",
    "(a?){3}b",
    "[^b]+",
    "(?i)A+",
    "a.b.c",
    r"(\w+\.)*fc1",
    r"(.*\.)?q_proj",
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\..*",
    r"(?!.*fc).*proj",
    r"\ba\b",
    "^a$",
    r"(?=.*mlp).*fc\d",
    r".*(?<=\.)fc1",
    "(?i:a)a?",
    ".*.*.*.*b",
    "(a*?b)*",
    "(|a)+",
    "((a|b)(a|b))*",
    "a|",
    r"(?s:.)*1",
]


def test_what_re_says_by_both_ways():
    both = set()
    for pattern in PATTERNS:
        tree = _parsed(pattern)
        assert _is_regular(tree)
        both.add(_has_few_ways(tree))
        for name in NAMES:
            expected = re.fullmatch(pattern, name) is not None
            assert fullmatch(pattern, name) == expected, (pattern, name)
            assert _AllWays(tree).fullmatch(name) == expected, (pattern, name)
    assert both == {True, False}


HOSTILE = [
    "(a+)+b",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*a){25}b",
    "(.*)*b",
    "(a?){60}a{60}b",
    ".*" * 30 + "b",
    "(?:a+)+?b",
    "((((a+)+)+)+)+b",
    "(?=(a+)+b).*",
    "(?!(a+)+b)b",
    r"(\w+\s?)*b",
    "(a{1,30}){1,30}b",
    "(?:(?=a*)a)*b",
    "([a-z]+)*[0-9]",
    "(a{0,4000000000}){0,4000000000}b",
    "(a+)+" * 20 + "b",
    "(?<=a)(a+)+b",
    "(a|b|ab)*c",
    "(a|aa)" * 40 + "b",
    "(?:aa?)" * 60 + "b",
]
REFUSED = [
    r"(a+)+\1b",
    r"((a+)+)(?(1)a|b)",
    "(?>(a+)+)b",
    "(a+)+" * 1000,
    "(",
    "(" * 5000,
    "a{99999999999}",
    "*",
    "(?P<n>",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_hangs(pattern):
    start = time.process_time()
    assert not fullmatch(pattern, "a" * 60)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_what_may_take_for_ever_or_is_no_pattern_is_refused(pattern):
    with pytest.raises(la.AdapterError) as raised:
        matches("a" * 60, pattern)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("method", "train"),
    [
        (lambda pattern: la.LoRA(rank=2, targets=pattern), ()),
        (lambda pattern: la.LoRA(rank=2, targets=["a" * 40], rank_pattern={pattern: 1}), ()),
        (lambda pattern: la.LoRA(rank=2, targets=["a" * 40]), "pattern"),
    ],
    ids=["targets", "rank_pattern", "train"],
)
def test_all_settings_that_are_patterns_end_in_time(method, train):
    for pattern in itertools.islice(HOSTILE, 6):
        model = nn.ModuleDict({"a" * 40: nn.Linear(4, 4)})
        with pytest.raises(la.TargetsNotFound):
            la.attach(model, method(pattern), train=train and pattern)


def test_patterns_that_peft_would_run_itself_are_refused():
    for settings in (
        {"target_modules": "(a+)+b"},
        {"target_modules": ["q"], "exclude_modules": "(a*)*b"},
        {"target_modules": ["q"], "rank_pattern": {"(a+)+b": 2}},
        {"target_modules": ["q"], "alpha_pattern": {"(a|aa)+b": 2}},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "(a+)+"},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["h", "(a+)+"]},
        {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": "(a+)+b"},
        {"peft_type": "FOURIERFT", "target_modules": ["q"], "n_frequency_pattern": {"(a+)+b": 2}},
        {"peft_type": "C3A", "target_modules": ["q"], "block_size_pattern": {"(a+)+b": 2}},
    ):
        with pytest.raises(la.AdapterError, match="may take for ever"):
            la.Peft({"peft_type": "LORA", **settings})
    la.Peft({"peft_type": "LORA", "target_modules": r"model\..*\.(q|v)_proj"})
