"""The reference of preference tuning: the pretrained model, from the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_adapters as la
from language.dpo.module import DPOTuner, preference_loss
from tests.language.dpo.preferring import METHODS, built, data, plain_log_probabilities, tuner
from tests.language.tiny import batch, moved, trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_pretrained_model_bit_for_bit(method):
    """In spite of dropout, of modules of `train`, and of what they have learned."""
    changes = {"adapters": METHODS[method], "train": ["norm", "lm_head"], "init_seed": 1}
    module, rows = moved(built(**changes)), batch(9, 14, 12, 7)
    pretrained = built(adapters=None, init_seed=1).eval()
    module.model.model.layers[0].train(False)
    modes = [m.training for m in module.modules()]
    bases = [a.base.training for _, a in la.adapters(module.model)]
    before = {n: p.clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        assert torch.equal(module.reference(rows), pretrained(rows))
        assert not torch.equal(module(rows), pretrained(rows))
    assert [m.training for m in module.modules()] == modes
    assert [a.base.training for _, a in la.adapters(module.model)] == bases
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert all(a.enabled for _, a in la.adapters(module.model))


def test_whole_fine_tuning_keeps_its_beginning():
    module, rows = moved(built(adapters=None, train=".*", init_seed=1)), batch(9, 14)
    with torch.no_grad():
        assert torch.equal(module.reference(rows), built(adapters=None, init_seed=1)(rows))


def test_the_reference_outlives_a_checkpoint(tmp_path):
    """A resumed or loaded model has learned heads; their initial values still are those of the pretrained model."""
    module = tuner(train=["lm_head"])
    trainer(tmp_path).fit(module, datamodule=data())
    seen = {}

    class Look(Callback):
        def on_train_start(self, run, again):
            with torch.no_grad():
                seen["reference"] = again.reference(rows)
                seen["head"] = again.model.lm_head.weight.clone()

    rows, seed = batch(9, 14), module.hparams["init_seed"]
    pretrained = built(adapters=None, init_seed=seed).eval()
    head = module.model.lm_head.weight.clone()
    assert not torch.equal(head, pretrained.model.lm_head.weight)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("initial" in name for name in kept["state_dict"])
    assert "model.lm_head.weight" in kept["state_dict"]

    again = tuner(train=["lm_head"], init_seed=seed)
    callbacks = [la.AdapterCallback(), ModelCheckpoint(tmp_path / "again"), Look()]
    run_again = trainer(tmp_path, max_epochs=2, callbacks=callbacks)
    run_again.fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    loaded = DPOTuner.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["beta"] == 0.1
    with torch.no_grad():
        expected = pretrained(rows)
        assert torch.equal(seen["head"], head)
        assert torch.equal(seen["reference"], expected)
        assert torch.equal(loaded.reference(rows), expected)
        assert torch.equal(loaded.model.lm_head.weight, head)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_modules_of_train_learn_under_autocast(tmp_path, precision):
    """Every module of `train` moves, in either precision."""
    module = tuner(train=["lm_head", "norm"])
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    run_it = trainer(tmp_path, precision=precision)
    run_it.fit(module, datamodule=data(train_subset=8))
    still = [n for n, p in module.named_parameters() if n in before and torch.equal(p, before[n].to(p))]
    assert not still
    assert module.reference.get_buffer("initial_0").dtype == module.model.lm_head.weight.dtype
    assert torch.isfinite(run_it.callback_metrics["train/loss"])
    assert run_it.callback_metrics["val/loss"].dtype == torch.float32
    assert run_it.callback_metrics["val/kl"] >= 0


def test_autocast_does_not_lend_the_casts_of_the_reference():
    """It keeps the cast of a weight: that of the initial head must not be taken for the present one's."""
    module, rows = moved(built(train=["lm_head"], init_seed=1)).eval(), batch(9, 14, 12, 7)
    reference = built(adapters=None, init_seed=1).eval()
    sums = []
    for model in (module, reference):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            sums.append(plain_log_probabilities(model.model, rows))
    rewards = 0.1 * (sums[0] - sums[1])
    expected = preference_loss(rewards[:2] - rewards[2:]).mean().item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(rows, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert module.model.lm_head.weight.grad.any()


def test_log_probabilities_are_taken_in_float32_under_autocast():
    module, rows = moved(built()).eval(), batch(60, 50, 55, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = module.compare(rows)
        logits = module(rows)
    assert logits.dtype == torch.bfloat16
    learned = rows["labels"][:, 1:] != -100
    tokens = F.log_softmax(logits[:, :-1].double(), -1).gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
    assert found.policy.dtype == found.divergence.dtype == torch.float32
    torch.testing.assert_close(found.policy.double(), (tokens * learned).sum(1), rtol=1e-5, atol=1e-4)
