"""Completions, their log-probabilities and advantages; and the model before training, found again."""

from __future__ import annotations

import copy

import pytest
import torch

import lit_adapters as la
from language.grpo.rollouts import advantages, joined, log_probabilities, sample
from language.reference import Reference
from tests.language import tiny
from tests.language.grpo.rewarding import METHODS, batch, built, log_softmax
from tests.language.tiny import moved

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def draw(module, seed=0, tokens=6, temperature=1.0):
    return sample(module.model, module.tokenizer, PROMPTS, tokens, temperature, seed)


# Sampling


def test_samples_are_a_function_of_the_seed():
    module = moved(built())
    before = torch.get_rng_state()
    first = draw(module)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert draw(module) == first
    assert draw(module, seed=1) != first
    assert [len(row) for row in first] == [6, 6, 6]


def test_settings_of_the_model_do_not_bend_the_distribution():
    module = moved(built())
    plain = draw(module)
    module.model.generation_config.update(top_k=1, suppress_tokens=list(range(200)), temperature=0.1)
    assert draw(module) == plain
    assert module.model.generation_config.top_k == 1


def test_samples_follow_the_softmax():
    """First tokens of 4000 completions against p, at a temperature that bends it."""
    module = moved(built())
    with torch.no_grad():
        module.model.lm_head.weight[:250] *= 0  # few tokens that matter
        module.model.lm_head.weight[250:] *= 30
        logits = module.model.eval()(torch.tensor([[5, 6]])).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    drawn = sample(module.model, module.tokenizer, [[5, 6]] * 4000, 1, 2.0, 0)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=259) / 4000
    errors = (expected * (1 - expected) / 4000).sqrt()
    assert expected.max() > 3 / 259
    assert ((counts - expected).abs() < 5 * errors + 1e-3).all()


@pytest.mark.parametrize("ends", [257, [40, 257]])
def test_completions_go_up_to_their_end(ends):
    """Random bytes, and with the end token made likely the empty completion: the end token alone."""
    module = built()
    module.model.generation_config.eos_token_id = ends
    with torch.no_grad():
        module.model.lm_head.weight[40] = 0
    rows = draw(module, tokens=100)
    wanted = {257} if ends == 257 else {40, 257}
    assert all(not wanted & set(row[:-1]) for row in rows)
    assert all(len(row) == 100 or row[-1] in wanted for row in rows)
    assert any(row[-1] in wanted for row in rows)
    module.model.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(2, torch.tensor(257), 1e4))
    assert draw(module) == [[257]] * 3
    rollout = joined(PROMPTS, draw(module), 258)
    assert rollout["labels"][:, :5].tolist() == [
        [-100] * 4 + [257],
        [-100, 257, -100, -100, -100],
        [-100] * 2 + [257] + [-100] * 2,
    ]
    assert torch.isfinite(log_probabilities(module, rollout, 1.0)).all()


# Log-probabilities


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_old_log_probabilities_are_those_of_the_policy_that_sampled(name, temperature):
    """Against float64 and the logits of all positions; with dropout, which sampling knows nothing of."""
    method = copy.deepcopy(METHODS[name])
    if hasattr(method, "dropout"):
        method.dropout = 0.5
    module = moved(built(adapters=method, temperature=temperature, iterations=2)).train()
    la.set_progress(module.model, 0.3)
    rollout = module._sample(batch(), 0)
    assert all(part.training for part in module.model.modules())
    exact = copy.deepcopy(module).eval().double()
    torch.testing.assert_close(rollout["old"].double(), log_softmax(exact, rollout), rtol=1e-5, atol=1e-5)
    later = copy.deepcopy(module)
    la.set_progress(later.model, 0.8)
    same = torch.allclose(log_softmax(later.eval(), rollout), rollout["old"], atol=1e-4)
    assert same == (name != "afa")


# Advantages


def test_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 5.0, 5.5])
    found = advantages(rewards, 3)
    for group, values in zip(rewards.view(-1, 3), found.view(-1, 3), strict=True):
        mean = sum(group) / 3
        deviation = (sum((r - mean) ** 2 for r in group) / 2) ** 0.5
        torch.testing.assert_close(values, (group - mean) / (deviation + 1e-4))


def test_equal_rewards_have_no_advantage():
    assert torch.equal(advantages(torch.full((7,), 0.1), 7), torch.zeros(7))  # their mean is not 0.1 in float32
    assert advantages(torch.tensor([0.1, 0.1, 0.0, 1.0]), 2).view(2, 2).any(1).tolist() == [False, True]


# The reference


@pytest.mark.parametrize("name", [*METHODS, "none"])
def test_the_reference_is_the_model_before_training(name):
    """Adapters and a trained module have moved; what they learned is there again afterwards."""
    changes = {"adapters": METHODS.get(name), "train": ["lm_head", "model.norm"], "init_seed": 5}
    module, rows = tiny.built(**changes), tiny.batch(9, 6)
    reference = Reference(module.model)
    fresh = tiny.built(**changes).eval()
    with torch.no_grad():
        expected = fresh.model.eval()(rows["input_ids"]).logits
        if name != "none":
            with la.disabled(fresh.model):
                expected = fresh.model(rows["input_ids"]).logits
        moved(module)
        learned = module.model.eval()(rows["input_ids"]).logits
        module.model.train()
        assert torch.equal(reference({"input_ids": rows["input_ids"]}), expected)
        assert all(part.training for part in module.model.modules())
        assert torch.equal(module.model.eval()(rows["input_ids"]).logits, learned)
    assert not torch.allclose(learned, expected, atol=1e-3)
