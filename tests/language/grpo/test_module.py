"""GRPO: its objective by plain formulas, runs that anneal, merge and resume, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

import lit_adapters as la
from language.grpo.module import GRPOTuner, clipped_objective
from language.grpo.rollouts import log_probabilities
from tests.language import tiny
from tests.language.grpo import rewarding
from tests.language.grpo.rewarding import METHODS, batch, built, questions, term, tuner
from tests.language.tiny import moved, trainer
from tests.tiers import fast_only

# The objective


def plain_objective(new, old, advantage, reference, low, high, weight):
    """The sum of the loss token by token, and how many are clipped."""
    total, clipped = 0.0, 0
    for n, o, a, r in zip(new, old, advantage, reference, strict=True):
        ratio = torch.exp(n - o)
        bounded = min(max(ratio, n.new_tensor(1 - low)), n.new_tensor(1 + high))
        total = total - min(ratio * a, bounded * a) + weight * (torch.exp(r - n) - (r - n) - 1)
        clipped += bool((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))
    return total, clipped


def test_the_objective_is_the_plain_formula():
    draw = torch.Generator().manual_seed(0)
    new, old, advantage, reference = torch.randn(4, 60, generator=draw, dtype=torch.float64)
    new, old, advantage = new / 3, old / 3, advantage.masked_fill(torch.arange(60) < 5, 0.0)
    new.requires_grad_()
    found = clipped_objective(new, old, advantage, reference, 0.2, 0.4, 0.1)
    total, clipped = plain_objective(new, old, advantage, reference, 0.2, 0.4, 0.1)
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert found.clipped == clipped > 5
    gradients = [torch.autograd.grad(value, new)[0] for value in (found.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert found.kl.item() == pytest.approx(((reference - new).exp() - (reference - new) - 1).sum().item())
    unweighted = clipped_objective(new, old, advantage, None, 0.2, 0.4, 0.1)
    assert unweighted.kl is None
    assert unweighted.loss.item() == pytest.approx((found.loss - 0.1 * found.kl).item())


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_formula_on_its_completions(name):
    """After the adapters have moved on from the policy that sampled; per token, over prompts of different lengths."""
    rows = batch(3)
    module = moved(built(adapters=METHODS[name], iterations=2, kl_weight=0.3, clip_low=0.02, clip_high=0.03))
    module.training_step(rows, 0)
    moved(module)
    loss = module.training_step(rows, 1)
    rollout = module.rollout
    counts = (rollout["labels"] != -100).sum(1)
    assert len(counts) == 12
    values = module.rewards(completions(module), [a for a in rows["answers"] for _ in range(4)])[:, 0]
    scaled = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in values.split(4)]).repeat_interleave(counts)
    exact = copy.deepcopy(module).double()
    new = rewarding.log_softmax(exact, rollout)
    with la.disabled(exact.model):
        reference = rewarding.log_softmax(exact, rollout)
    total, clipped = plain_objective(new, rollout["old"].double(), scaled.double(), reference, 0.02, 0.03, 0.3)
    assert loss.item() == pytest.approx(total.item() / len(new), rel=1e-4)
    assert clipped > 0
    assert rollout["reward"].item() == pytest.approx(values.mean().item())


def completions(module):
    labels = module.rollout["labels"]
    return module.tokenizer.batch_decode([row[row != -100] for row in labels], skip_special_tokens=True)


def test_the_first_step_on_a_sample_is_the_policy_gradient():
    """Without dropout the ratio is 1, so the gradient is that of -A log p."""
    module, rows = moved(built(kl_weight=0.0)), batch()
    module.training_step(rows, 0).backward()
    weight = module.model.model.layers[0].mlp.up_proj.lora_B
    logp = log_probabilities(module, module.rollout, 1.0)
    (expected,) = torch.autograd.grad(-(module.rollout["advantages"] * logp).sum() / len(logp), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_one_step_on_a_sample_takes_a_pass_less(name, dropout):
    """The same loss and gradient as with pi_old of its own pass, which dropout still needs."""
    results = []
    for iterations in (1, 2):
        method = copy.deepcopy(METHODS[name])
        if hasattr(method, "dropout"):
            method.dropout = dropout
        torch.manual_seed(0)
        module = moved(built(adapters=method, iterations=iterations, temperature=0.7)).train()
        la.set_progress(module.model, 0.3)
        module._sample(batch(), 0)  # what is built at the first call is built
        passes = []
        module.model.model.register_forward_hook(lambda m, args, out, passes=passes: passes.append(m.training))
        torch.manual_seed(1)
        loss = module.training_step(batch(), 0)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in module.parameters() if p.requires_grad], passes))
    (loss, gradients, passes), (wanted, expected, more) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert passes.count(True) == more.count(True) == 1
    has_dropout = dropout > 0 and hasattr(METHODS[name], "dropout")
    assert len(more) - len(passes) == (not has_dropout)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_equal_rewards_teach_nothing(tmp_path, weight):
    module = moved(built(rewards=[term("constant")], kl_weight=weight))
    module.training_step(batch(), 0).backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.any() for g in gradients) == (weight > 0)
    run = trainer(tmp_path)  # nor does that stop a run
    run.fit(tuner(rewards=[term("constant")], kl_weight=weight), datamodule=questions())
    assert run.global_step == 6
    assert run.callback_metrics["train/zero_advantage"] == 1
    assert run.callback_metrics["train/reward"] == pytest.approx(0.1)


# Runs


def test_what_is_logged(tmp_path):
    run = trainer(tmp_path)
    module = tuner(rewards=[term("letters"), term("constant", 2.0)])
    run.fit(module, datamodule=questions())
    names = {"loss", "reward", "letters", "constant", "reward_std", "kl", "clip_fraction"}
    names = {f"train/{n}" for n in names | {"completion_length", "zero_advantage"}}
    assert names | {f"val/{n}" for n in ("reward", "letters", "constant")} <= set(run.callback_metrics)
    assert run.callback_metrics["train/completion_length"] <= 6
    assert run.callback_metrics["train/reward"] == pytest.approx(run.callback_metrics["train/letters"] + 0.2)
    data = questions(batch_size=3)  # four rows in uneven batches
    measured = run.validate(module, datamodule=data, verbose=False)[0]
    texts = [text for rows in data.val_dataloader() for text in module.predict_step(rows, 0)]
    expected = sum(rewarding.letters(text, "") for text in texts) / 4
    assert measured == pytest.approx({"val/letters": expected, "val/constant": 0.1, "val/reward": expected + 0.2})
    again = trainer(tmp_path / "again")
    again.fit(module, datamodule=data)  # what inference mode has reset is written to again
    assert "val/reward" in again.callback_metrics


def test_rewards_rise(tmp_path):
    """ASCII bytes are learned in a few steps."""
    changes = {"group_size": 16, "kl_weight": 0.0, "max_new_tokens": 4, "adapters": METHODS["afa"]}
    module = built(lr=5e-2, **changes)
    module.model.lm_head.weight.mul_(20)  # as small as it is, any hidden state would give nearly equal logits
    start = copy.deepcopy(module)._sample(batch(4), 0)["reward"]
    run = trainer(tmp_path, max_epochs=2, gradient_clip_val=1.0, callbacks=[la.AdapterCallback(figures=False)])
    run.fit(module, datamodule=questions(val_fraction=0.0, batch_size=4))
    assert run.global_step == 8
    assert run.callback_metrics["train/reward"] > start + 0.05  # of at most 0.5


SCHEDULES = {
    "linear": la.schedules.Linear(end=0.5),
    "adaptive": la.schedules.Adaptive(duration=0.4, end=0.9, window=5),
}


@pytest.mark.parametrize(
    ("schedule", "name"),
    fast_only([("linear", "letters")], [("linear", "letters"), ("adaptive", "letters"), ("adaptive", "falling")]),
)
def test_annealing_ends_at_zero_and_merges(tmp_path, schedule, name):
    """An adaptive schedule follows the reward: it waits for its deadline where that falls."""
    betas = []

    class Watch(la.AdapterCallback):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            betas.append(self._annealing.beta)

    changes = {"rewards": [term(name)], "group_size": 2, "max_new_tokens": 2, "kl_weight": 0.0}
    module = tuner(adapters=la.AFALoRA(rank=2, schedule=SCHEDULES[schedule]), **changes)
    data = questions(val_fraction=0.0, batch_size=4)
    trainer(tmp_path, max_epochs=5, callbacks=[Watch(figures=False)]).fit(module, datamodule=data)
    assert len(betas) == 20
    assert betas[-1] == 0.0
    assert all(a.beta.item() == 0.0 for _, a in la.adapters(module.model))
    if name == "falling":
        assert betas[9] == betas[0] < 1.0  # half of the way, after one step that knew of no fall yet
        assert betas[16] > 0.0
        assert betas[17] == 0.0  # the deadline
    rows = tiny.batch(9, 5)
    with torch.no_grad():
        before = module.eval()(rows)
        la.merge(module.model)
        torch.testing.assert_close(module(rows), before, rtol=1e-4, atol=1e-5)


def everything(module, run):
    moments = run.optimizers[0].state_dict()["state"]
    flat = {f"{i}.{k}": v for i, values in moments.items() for k, v in values.items()}
    return {**module.state_dict(), **flat, "random": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("name", "step"), fast_only([("lora", 3), ("afa", 4)], [*((name, 3) for name in METHODS), ("afa", 4)])
)
def test_resuming_between_two_steps_on_one_sample(tmp_path, name, step):
    """Bit for bit, in the middle of a sample or after it, with dropout and annealing."""
    method = copy.deepcopy(METHODS[name])
    if hasattr(method, "dropout"):
        method.dropout = 0.2
    data = {"iterations": 2, "batch_size": 4, "train_subset": 12, "val_fraction": 0.0}
    changes = {
        "group_size": 2,
        "max_new_tokens": 3,
        "adapters": method,
        "iterations": 2,
        "train": ["lm_head"],
        "init_seed": 3,
    }

    def fit(folder, **more):
        torch.manual_seed(7)
        kept = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        run, module = trainer(folder, callbacks=[la.AdapterCallback(figures=False), kept]), tuner(**changes)
        run.fit(module, datamodule=questions(**data), **more)
        assert run.global_step == 6
        return everything(module, run)

    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_trained_modules_learn_under_autocast(tmp_path):
    """Sampling casts their weights without gradients before the loss does with them."""
    module = tuner(train=["lm_head"])
    trainer(tmp_path, precision="bf16-mixed").fit(module, datamodule=questions())
    fresh = built(train=["lm_head"])
    assert not torch.equal(module.model.lm_head.weight, fresh.model.lm_head.weight)


def test_sampling_is_not_counted_as_training(tmp_path):
    """The inputs of activations are observed in the pass that learns, and not in those before it."""
    module = tuner(adapters=METHODS["nora_plus_plus"], kl_weight=0.3)
    passes = []
    module.configure_model()
    module.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    seen = []

    class Watch(la.AdapterCallback):
        def on_train_batch_end(self, trainer, *arguments):
            seen.append(sum(c.sum().item() for c in self._recording._recorder.observer.counts.values()))
            super().on_train_batch_end(trainer, *arguments)

    run = trainer(tmp_path, callbacks=[Watch(log_every_n_steps=1, figures=False)], limit_train_batches=2)
    run.fit(module, datamodule=questions())
    assert passes.count(True) == 2 < len(passes)
    layers = [a for _, a in la.adapters(module.model) if a.method == "nora"]
    rows = module.rollout
    counted = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda a, args: counted.append(a.input_histogram(args[0]).sum().item()))
    log_probabilities(module, rows, 1.0)
    assert seen[1] - seen[0] == sum(counted) > 0


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 1}, "group_size 1 must be a whole number, at least 2"),
        ({"iterations": 0}, "iterations 0 must be a whole number, at least 1"),
        ({"temperature": 0.0}, r"temperature 0\.0 must be a finite number from 1e-06 to 1000"),
        ({"clip_low": -0.1}, r"clip_low -0\.1 must be a finite number from 0 to 1"),
        ({"kl_weight": math.nan}, "kl_weight nan must be a finite number from 0 to 1000"),
        ({"rewards": []}, "rewards is empty"),
    ],
)
def test_values_out_of_range(changes, words):
    with pytest.raises(la.AdapterError, match=words):
        tuner(**changes)


def test_iterations_and_accumulation(tmp_path):
    run = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(la.AdapterError, match=r"iterations 2 .*accumulate_grad_batches is 2: set one of them to 1"):
        run.fit(tuner(iterations=2), datamodule=questions(iterations=2))
    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(tuner(), datamodule=questions())
    assert run.global_step == 3
    run = trainer(tmp_path, callbacks=[la.AdapterCallback(), GradientAccumulationScheduler({2: 4})])
    with pytest.raises(la.AdapterError, match="GradientAccumulationScheduler accumulates several: set iterations to 1"):
        run.fit(tuner(iterations=2), datamodule=questions(iterations=2))
    run = trainer(tmp_path, overfit_batches=2)
    with pytest.raises(la.AdapterError, match=r"trainer\.overfit_batches 2 takes batches in an order of its own"):
        run.fit(tuner(iterations=2), datamodule=questions(iterations=2))


def test_a_data_module_that_does_not_repeat_its_batches(tmp_path):
    with pytest.raises(la.DataError, match=r"batch 1 holds other prompts .* give the data module iterations=2"):
        trainer(tmp_path).fit(tuner(iterations=2), datamodule=questions())


def test_completions_that_do_not_fit(tmp_path):
    with pytest.raises(la.DataError, match=r"data\.max_length 500 and max_new_tokens 20 exceed the model's 512"):
        trainer(tmp_path).fit(tuner(max_new_tokens=20), datamodule=questions(max_length=500))


def test_what_was_trained_is_found_again(tmp_path):
    module = tuner(adapters=METHODS["afa"], iterations=2, rewards=[term("letters", 2.0)])
    trainer(tmp_path).fit(module, datamodule=questions(iterations=2))
    loaded = GRPOTuner.load_from_checkpoint(tmp_path / "last.ckpt")
    rows = tiny.batch(9, 14)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(rows), module.eval()(rows))
    assert loaded.rewards.terms == module.rewards.terms
    assert loaded.hparams["iterations"] == 2
