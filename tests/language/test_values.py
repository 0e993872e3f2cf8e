"""Settings of the regimes that nobody can mean are refused as soon as they are given, each by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lit_adapters as la
from language.dpo.module import DPOTuner
from language.draft.decoding import DecodingSettings
from language.draft.module import DraftTuner
from language.generate import continuations
from language.grpo.module import GRPOTuner
from language.grpo.rewards import Rewards
from language.module import CausalLMTuner
from tests.language import tiny
from tests.language.grpo import rewarding
from tests.language.grpo.rewarding import term

NAN, INF = math.nan, math.inf
LETTERS = "tests.language.grpo.rewarding.letters"
COMMON: dict[str, list[Any]] = {
    "max_new_tokens": [-5, 0, 1.5, "7", True, None, INF],
    "gradient_checkpointing": ["yes", 1, None],
    "init_seed": [1.5, "1", 2**64, INF],
}
REGIMES: dict[str, tuple[type, dict[str, Any], dict[str, list[Any]]]] = {
    "sft": (CausalLMTuner, {}, {}),
    "dpo": (
        DPOTuner,
        {},
        {"beta": [-1, 0, NAN, INF, 1e30, "0.1", True, None], "label_smoothing": [-0.1, 0.5, 2, NAN, INF, "0", None]},
    ),
    "draft": (DraftTuner, {"keep_layers": [0]}, {}),
    "grpo": (
        GRPOTuner,
        {"rewards": [term("letters")]},
        {
            "temperature": [INF, -INF, NAN, 0, -1, 1e30, 1e-30, "1", True, None],
            "clip_low": [5, 0, -1, NAN, INF, 1.1, "0.2", None],
            "clip_high": [0, -1, NAN, INF, 1e30, "0.2", None],
            "kl_weight": [-1, NAN, INF, 1e30, "0", True, None],
            "group_size": [1, 0, -3, 2.0, "4", True, INF],
            "iterations": [0, -1, 1.0, "2", True, NAN],
        },
    ),
}
CASES = [
    (regime, name, value)
    for regime, (_, _, own) in REGIMES.items()
    for name, values in (COMMON | own).items()
    for value in values
    if not (name == "init_seed" and value is None)
]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_setting_of_a_regime(regime):
    kind, needed, _ = REGIMES[regime]
    tiny.tuner(kind, **needed)
    tried = [(name, value) for which, name, value in CASES if which == regime]
    assert len(tried) >= 14
    for name, value in tried:
        with pytest.raises(la.AdapterError, match=f"^{name} "):
            tiny.tuner(kind, **needed | {name: value})


REWARDS: list[Any] = [
    [],
    [{"function": LETTERS, "weight": INF}],
    [{"function": LETTERS, "weight": -INF}],
    [{"function": LETTERS, "weight": NAN}],
    [{"function": LETTERS, "weight": 1e30}],
    [{"function": LETTERS, "weight": "1"}],
    [{"function": LETTERS, "weight": None}],
    [{"function": LETTERS, "weight": True}],
    [{"function": LETTERS, "weight": 0.0}],
    [term("letters", 0.0), term("constant", 0.0)],
    [{"function": LETTERS, "wieght": 1.0}],
    [{"weight": 1.0}],
    [{}],
    [{"function": 3}],
    [{"function": None}],
    [{"function": ""}],
    [{"function": "nowhere.at_all"}],
    [{"function": "tests.language.grpo.rewarding.NOT_A_FUNCTION"}],
    ["letters"],
    [3],
    [None],
    [term("letters"), term("letters")],
]


@pytest.mark.parametrize("rewards", REWARDS)
def test_rewards(rewards):
    with pytest.raises(la.AdapterError):
        Rewards(rewards)


def test_a_reward_may_be_recorded_with_weight_0():
    assert Rewards([term("letters"), term("constant", 0.0)]).weights.tolist() == [1.0, 0.0]


DECODING: list[dict[str, Any]] = [
    *({"temperatures": (value,)} for value in (-1, NAN, INF, 1e30, 1e-30, "1", True, None)),
    *({"max_new_tokens": value} for value in (0, -5, 1.5, "3", True, None)),
    *({"draft_tokens": value} for value in (0, -5, 1.5, "3", True, None)),
    *({"seed": value} for value in (-1, 1.5, "3", 2**63)),
    {"temperatures": ()},
]


def test_decoding():
    for settings in DECODING:
        (name,) = settings
        with pytest.raises(la.AdapterError, match=f"^{name.removesuffix('s')}"):
            DecodingSettings(**settings)


@pytest.mark.parametrize("layers", [[True], [0.0], ["0"], [None], [-1], [2], [1, 0], [0, 0], []])
def test_layers_of_a_draft(layers):
    with pytest.raises(la.AdapterError, match="keep_layers"):
        tiny.built(DraftTuner, keep_layers=layers)


# Values that are not finite


def spoiled(module: nn.Module, value: float, where: str) -> str:
    """Put a value into one place of a frozen parameter; its name."""
    name, parameter = next((n, p) for n, p in module.named_parameters() if where in n and not p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[:64] = value
    return name


@pytest.mark.parametrize("where", ["lm_head", "layers.1.mlp.down_proj", "embed_tokens"])
def test_a_broken_base_generates_nothing(where):
    prompts = [list(range(60)), [1, 2]]
    for value in (NAN, INF, -INF):
        for temperature in (0.0, 1.0):
            module = tiny.built()
            name = spoiled(module, value, where)
            with pytest.raises(la.AdapterError, match=f"LlamaForCausalLM is not a number: the parameter '{name[6:]}'"):
                continuations(module.model, module.tokenizer, prompts, 4, temperature)


def test_weights_that_overflow_are_no_traceback_of_multinomial():
    module = tiny.built()
    with torch.no_grad():
        module.model.lm_head.weight.fill_(3e38)
    with pytest.raises(la.AdapterError, match="not a number: its weights are too large"):
        continuations(module.model, module.tokenizer, [[3, 4, 5]], 4, 1.0)


@pytest.mark.parametrize("value", [NAN, INF])
def test_reinforcement_of_a_broken_base_ends_with_one_clear_error(tmp_path, value):
    module = rewarding.built()
    name = spoiled(module, value, "layers.1.mlp.down_proj")
    with pytest.raises(la.AdapterError, match=f"not a number.*{name.removeprefix('model.')}"):
        tiny.trainer(tmp_path).fit(module, datamodule=rewarding.questions())
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("regime", ["sft", "grpo"])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_rate_beyond_all_numbers_saves_nothing_that_is_not_finite(tmp_path, regime, precision):
    changes: dict[str, Any] = {
        "adapters": None,
        "train": ".*",
        "dtype": "bfloat16" if "bf16" in precision else "float32",
    }
    module = rewarding.tuner(**changes) if regime == "grpo" else tiny.tuner(**changes)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e38)
    data = rewarding.questions() if regime == "grpo" else tiny.data(train_subset=8)
    with pytest.raises(la.AdapterError, match=r"not finite|is nan|is inf|not a number"):
        tiny.trainer(tmp_path, precision=precision, max_epochs=3).fit(module, datamodule=data)
    for file in tmp_path.rglob("*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())
