"""Preference tuning: the loss, and what is refused."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import lit_adapters as la
from language.dpo.module import DPOTuner, preference_loss, wins
from tests.language.dpo.preferring import METHODS, built, data, plain_log_probabilities, tuner
from tests.language.tiny import batch, moved, trainer


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def test_the_loss_is_the_formula():
    margin = torch.linspace(-30, 30, 61, dtype=torch.float64)
    for eps in (0.0, 0.2):
        wrong, right = ([math.log1p(math.exp(sign * m)) for m in margin.tolist()] for sign in (1, -1))
        expected = [(1 - eps) * r + eps * w for r, w in zip(right, wrong, strict=True)]
        assert preference_loss(margin, eps).tolist() == pytest.approx(expected, rel=1e-12)
    assert preference_loss(margin, 0.2).argmin() == (margin - math.log(0.8 / 0.2)).abs().argmin()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_against_a_second_model(method):
    """The reference is a model of its own here, and everything is computed in float64."""
    module = moved(built(adapters=METHODS[method], beta=0.3, label_smoothing=0.1, init_seed=1)).double().eval()
    reference = built(adapters=None, init_seed=1).double().eval()
    rows = batch(9, 14, 12, 7)
    ours, theirs = plain_log_probabilities(module.model, rows), plain_log_probabilities(reference.model, rows)
    rewards = 0.3 * (ours - theirs.detach())
    margins = rewards[:2] - rewards[2:]
    expected = (-0.9 * torch.log(torch.sigmoid(margins)) - 0.1 * torch.log(torch.sigmoid(-margins))).mean()
    parameters = [p for p in module.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    loss = module.training_step(rows, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert (gradient - want).norm() <= 1e-4 * want.norm()

    module.on_validation_epoch_end = lambda: None
    module.validation_step(rows, 0)
    measured = module.val_means.compute()
    of_chosen = rows["labels"][:2] != -100
    with torch.no_grad():
        logits = [
            m.model(input_ids=rows["input_ids"][:2]).logits[:, :-1][of_chosen[:, 1:]] for m in (module, reference)
        ]
        ours, theirs = (x.double().softmax(-1) for x in logits)
    assert measured["kl"].item() == pytest.approx((ours * (ours / theirs).log()).sum(-1).mean().item(), rel=1e-4)
    assert measured["kl"] > 0
    assert measured["reward_margin"].item() == pytest.approx(margins.mean().item(), rel=1e-4)
    assert measured["reward_accuracy"].item() == (margins > 0).double().mean().item()
    assert measured["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_before_training_the_model_is_its_reference(method):
    module, rows = built(adapters=METHODS[method]).eval(), batch(9, 14, 12, 7)
    module.validation_step(rows, 0)
    measured = {name: value.item() for name, value in module.val_means.compute().items()}
    expected = {"loss": math.log(2), "reward_accuracy": 0.5, "reward_margin": 0.0, "kl": 0.0}
    exact = method not in ("dora", "nora_plus_plus")  # the one divides by norms, the other starts at a fit of SiLU
    assert measured["reward_accuracy"] == 0.5 or not exact
    measured["reward_accuracy"] = 0.5
    assert measured == pytest.approx(expected, abs=0.0 if exact else 1e-2, rel=1e-6)


def test_ties_count_half_and_means_are_exact_over_uneven_batches():
    metrics = built().val_means
    margins, divergence = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5]), torch.arange(7.0)
    for a, b, c, d in ((0, 3, 0, 1), (3, 5, 1, 7)):
        part = {"loss": preference_loss(margins[a:b]), "reward_accuracy": wins(margins[a:b])}
        metrics.update(part | {"reward_margin": margins[a:b], "kl": divergence[c:d]})
    measured = metrics.compute()
    assert measured["reward_accuracy"].item() == pytest.approx(3.5 / 5)
    assert measured["reward_margin"].item() == pytest.approx(margins.mean().item())
    assert measured["loss"].item() == pytest.approx(preference_loss(margins).mean().item())
    assert measured["kl"].item() == pytest.approx(3.0)


def test_as_in_trl():
    """Loss and gradient of trl's own trainer on the same batch, its reference being a second model."""
    trl = pytest.importorskip("trl")
    module = moved(built(adapters=METHODS["dora"], beta=0.2, init_seed=1)).eval()
    reference = built(adapters=None, init_seed=1).eval().model
    policy, rows = copy.deepcopy(module.model), batch(9, 14, 12, 7)
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    for model in (policy, reference):
        add_fused_lm_head(model, outputs=outputs)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    fake = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=accelerator, beta=0.2, loss_types=["sigmoid"], loss_weights=[1.0]
    )
    vars(fake).update(ld_alpha=None, aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False)
    vars(fake).update(f_divergence_type="reverse_kl", label_smoothing=0.0, _total_train_tokens=0, _tp_size=1)
    vars(fake).update(args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    fake._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    given = {k: rows[k] for k in ("input_ids", "attention_mask")} | {"completion_mask": (rows["labels"] != -100).long()}
    expected = trl.DPOTrainer._compute_loss(fake, policy, given, return_outputs=False)
    loss = module.training_step(rows, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    loss.backward()
    theirs = dict(policy.named_parameters())
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, r"beta 0\.0 must be above 0"),
        ({"beta": float("nan")}, "beta nan must be a finite number"),
        ({"label_smoothing": 0.5}, r"label_smoothing 0\.5 must be at least 0 and below 0\.5"),
    ],
)
def test_values_out_of_range(changes, words):
    with pytest.raises(la.AdapterError, match=words):
        tuner(**changes)


@pytest.mark.parametrize("unload", [False, True])
def test_merged_adapters_leave_no_reference(tmp_path, unload):
    module = moved(built())
    la.merge(module.model, unload=unload)
    words = r"merged into the weights" if unload else r"'model\.layers\.0\.self_attn\.q_proj' is merged into its weight"
    with pytest.raises(la.AdapterError, match=words):
        trainer(tmp_path).validate(module, datamodule=data(), verbose=False)
    assert {m.training for m in module.model.modules()} == {False}


def test_batches_that_hold_no_pairs(tmp_path):
    odd, empty = batch(9, 14, 8), batch(9, 14, 8, 12)
    empty["labels"][2] = -100
    for rows, words in ((odd, "a batch of 3 rows, 3 of them"), (empty, "a batch of 4 rows, 3 of them")):
        with pytest.raises(la.DataError, match=f"{words} with an answer, is not made of pairs"):
            trainer(tmp_path).fit(tuner(), loader(rows))
        with pytest.raises(la.DataError, match=words):
            trainer(tmp_path).validate(tuner(), loader(rows), verbose=False)


def test_a_sharded_model_with_modules_of_train(monkeypatch):
    module = tuner(train=["lm_head"])
    monkeypatch.setattr(DPOTuner, "device_mesh", object())
    with pytest.raises(la.AdapterError, match=r"train=\['lm_head'\] needs its initial values whole"):
        module.configure_model()
