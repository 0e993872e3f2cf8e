"""Preference tuning: the loss, its reference, training to a model that merges, resuming, and the command line."""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lit_adapters as la
from language.__main__ import LanguageCLI
from language.dpo import DPOTuner, PreferenceMetrics, main, preference_loss
from language.pairs import PreferenceDataModule
from lit_adapters.callback import build_optimizers
from lit_adapters.callback.console import run
from tests.language.tiny import ADAMW, CONFIGS, QUIET, batch, events, log_dir, moved, trainer

PAIRS = str(CONFIGS / "smoke/pairs.jsonl")
METHODS = {
    "lora": la.LoRA(rank=2, dropout=0.2),
    "dora": la.DoRA(rank=2, dropout=0.2),
    "nora_plus_plus": la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2, dropout=0.2)),
    "loran": la.LoRAN(rank=2, dropout=0.2, function="sine"),
    "afa": la.AFALoRA(rank=2, dropout=0.2),
}


def tuner(**changes):
    module = DPOTuner(**{"model": "tiny_llama", "adapters": la.LoRA(rank=2)} | changes)
    module.configure_optimizers = lambda: build_optimizers(module, ADAMW)
    return module


def built(**changes):
    module = tuner(**changes)
    module.configure_model()
    return module


def data(**changes):
    return PreferenceDataModule(
        PAIRS, **{"tokenizer": "tiny_llama", "max_length": 96, "batch_size": 4, "val_fraction": 0.3} | changes
    )


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def plain_log_probabilities(model, rows):
    """log p of each answer in float64, token by token from whole logits."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.double()
    sums = []
    for line, ids, labels in zip(logits, rows["input_ids"], rows["labels"], strict=True):
        at = [t for t in range(1, len(ids)) if labels[t] != -100]
        sums.append(sum(line[t - 1].log_softmax(-1)[ids[t]] for t in at))
    return torch.stack(sums)


# The loss


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
    measured = module.val_preferences.compute()
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
    measured = {name: value.item() for name, value in module.val_preferences.compute().items()}
    expected = {"loss": math.log(2), "reward_accuracy": 0.5, "reward_margin": 0.0, "kl": 0.0}
    exact = method not in ("dora", "nora_plus_plus")  # the one divides by norms, the other starts at a fit of SiLU
    assert measured["reward_accuracy"] == 0.5 or not exact
    measured["reward_accuracy"] = 0.5
    assert measured == pytest.approx(expected, abs=0.0 if exact else 1e-2, rel=1e-6)


def test_ties_count_half_and_means_are_exact_over_uneven_batches():
    metrics = PreferenceMetrics()
    margins, divergence = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5]), torch.arange(7.0)
    for a, b, c, d in ((0, 3, 0, 1), (3, 5, 1, 7)):
        metrics.update(preference_loss(margins[a:b]), margins[a:b], divergence[c:d])
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


# The reference


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


# Training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_training_pairs(tmp_path, method):
    module = tuner(adapters=METHODS[method], beta=0.5)
    run_it = trainer(tmp_path, max_epochs=6, check_val_every_n_epoch=6)
    run_it.fit(module, datamodule=data(train_subset=8, batch_size=8))
    metrics = run_it.callback_metrics
    assert {"val/loss", "val/reward_accuracy", "val/reward_margin", "val/kl", "train/reward_margin"} <= set(metrics)
    given = data(train_subset=8, batch_size=8)
    given.setup("fit")
    module.eval().validation_step(next(iter(given.train_dataloader())), 0)
    learned = module.val_preferences.compute()
    assert learned["loss"] < math.log(2)
    assert learned["reward_margin"] > 0
    assert learned["kl"] > 0


def schedules():
    return {
        "linear": la.schedules.Linear(end=0.5),
        "adaptive": la.schedules.Adaptive(duration=0.4, end=0.7, window=5),
        "adaptive, by its deadline": la.schedules.Adaptive(duration=0.2, end=0.9, window=5),
    }


@pytest.mark.parametrize("name", schedules())
def test_annealing_ends_at_zero_and_merges(tmp_path, name):
    """The adaptive schedule follows the loss that `training_step` returns: this one."""
    betas = []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            betas.append(callback._annealer.beta)

    callback = la.AdapterCallback()
    module = tuner(adapters=la.AFALoRA(rank=2, schedule=schedules()[name]))
    if "deadline" in name:  # a loss that rises throughout
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (1 + module.global_step)
    run_it = trainer(tmp_path, max_epochs=4, callbacks=[callback, Watch()], enable_checkpointing=False)
    run_it.fit(module, datamodule=data())
    assert betas == sorted(betas, reverse=True)
    assert betas[-1] == 0.0
    assert any(0.0 < beta <= 1.0 for beta in betas)
    if "deadline" in name:
        assert betas.count(betas[0]) > len(betas) / 2  # held, after the first step
        assert callback._annealer._means[5][0] > math.log(2)
    rows = batch(9, 14)
    with torch.no_grad():
        before = module.eval()(rows)
        report = la.merge(module.model)
        assert len(report.merged) == 14
        assert not report.kept
        torch.testing.assert_close(module(rows), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "adaptive"])
def test_resuming_is_exact(tmp_path, name):
    """From between two optimiser steps of an epoch, with dropout, accumulation and a trained head."""
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    changes = {
        "adapters": la.AFALoRA(rank=2, dropout=0.3, schedule=schedules()[name]),
        "train": ["lm_head"],
        "init_seed": 5,
    }

    def fit(folder, **given):
        seed_everything(3, verbose=False)
        module = tuner(**changes)
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run_it = trainer(folder, callbacks=[la.AdapterCallback(), every], **settings)
        run_it.fit(module, datamodule=data(batch_size=2), **given)
        run_it.save_checkpoint(folder / "end.ckpt")
        return torch.load(folder / "end.ckpt", weights_only=True)

    whole = fit(tmp_path / "whole")
    middle = tmp_path / "whole" / "step=2.ckpt"
    loops = torch.load(middle, weights_only=True)["loops"]["fit_loop"]
    assert 0 < loops["epoch_loop.batch_progress"]["current"]["completed"] < 8
    resumed = fit(tmp_path / "resumed", ckpt_path=middle)
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for one, other in zip(*(s["optimizer_states"][0]["state"].values() for s in (whole, resumed)), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole["learned_tokens"] == resumed["learned_tokens"] > 0


def test_gradient_checkpointing_and_packed_weights(tmp_path):
    module = tuner(gradient_checkpointing=True, quantization="nf4", dtype="bfloat16")
    run_it = trainer(tmp_path, precision="bf16-true")
    run_it.fit(module, datamodule=data(train_subset=4))
    assert torch.isfinite(run_it.callback_metrics["val/loss"])


def test_calibration_reads_both_answers(tmp_path):
    module = tuner(adapters=la.NoRA(groups=4, base="anchored", fit_range="calibrate"))
    trainer(tmp_path).fit(module, datamodule=data(train_subset=4))
    assert not any(a.awaits_calibration for _, a in la.adapters(module.model))


def test_statistics_are_of_the_model_and_not_of_its_reference(tmp_path):
    """Inputs of adapters are observed once a batch."""
    callback = la.AdapterCallback(log_every_n_steps=1)
    module = tuner(adapters=la.NoRA(groups=4, base="anchored"))
    sizes, step = [], module.training_step
    module.training_step = lambda batch, batch_idx: sizes.append(batch["input_ids"].numel()) or step(batch, batch_idx)
    run_it = trainer(tmp_path, callbacks=[callback], logger=True, enable_checkpointing=False)
    run_it.fit(module, datamodule=data(train_subset=8))
    counts = callback._recorder._observer.counts
    once = [a.input_histogram(torch.zeros(1, size, 64)).sum() for _, a in la.adapters(module.model) for size in sizes]
    assert sum(c.sum() for c in counts.values()) == sum(once)


def test_predicting_continues_each_prompt_once(tmp_path):
    module = built(max_new_tokens=3)
    texts = trainer(tmp_path).predict(module, loader(batch(9, 6, 9, 8)))
    assert [len(group) for group in texts] == [2]


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, r"beta 0\.0 must be above 0"),
        ({"beta": float("nan")}, "beta nan must be above 0"),
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
        with pytest.raises(la.DataError, match=f"{words} with an answer, is none of pairs"):
            trainer(tmp_path).fit(tuner(), loader(rows))
        with pytest.raises(la.DataError, match=words):
            trainer(tmp_path).validate(tuner(), loader(rows), verbose=False)


def test_a_sharded_model_with_modules_of_train(monkeypatch):
    module = tuner(train=["lm_head"])
    monkeypatch.setattr(DPOTuner, "device_mesh", object())
    with pytest.raises(la.AdapterError, match=r"train=\['lm_head'\] needs its initial values whole"):
        module.configure_model()


# The command line


def command(subcommand, root, *overrides, config="smoke/dpo"):
    """The recipe through the real command line, without the parsers of the other subcommands."""
    used = {name: skip for name, skip in LanguageCLI.subcommands().items() if name == subcommand}
    save = [f"--trainer.logger.init_args.save_dir={root}", f"--data.path={PAIRS}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dpo"])
        patch.setattr(LanguageCLI, "subcommands", staticmethod(lambda: used))
        return main([subcommand, f"--config={CONFIGS / config}.yaml", *save, *QUIET, *overrides])


def test_the_smoke_recipe(tmp_path):
    fitted = command("fit", tmp_path)
    board = events(log_dir(fitted))
    names = ("loss", "reward_accuracy", "reward_margin")
    assert {f"{split}/{name}" for split in ("train", "val") for name in names} <= set(board.Tags()["scalars"])
    assert {"val/kl", "adapter/beta", "train/learned_tokens"} <= set(board.Tags()["scalars"])
    assert board.Scalars("adapter/beta")[-1].value == 0.0
    path = log_dir(fitted) / "checkpoints" / "last.ckpt"
    loaded = DPOTuner.load_from_checkpoint(path)
    tested = command("test", tmp_path, f"--ckpt_path={path}").trainer.callback_metrics
    again = fitted.trainer.test(loaded, datamodule=fitted.datamodule, verbose=False)[0]
    assert {k: v.item() for k, v in tested.items()} == pytest.approx(again)
    assert set(again) == {"test/loss", "test/reward_accuracy", "test/reward_margin", "test/kl"}


OVERRIDES = [
    *("--model.model=tiny_llama", "--data.use_chat_template=false", "--data.batch_size=2", "--data.max_length=192"),
    *("--data.train_subset=4", "--data.val_subset=2", "--data.val_fraction=0.3"),
    *("--trainer.accelerator=cpu", "--trainer.fast_dev_run=true"),
]


@pytest.mark.parametrize("name", ["smollm2", "llama3_8b"])
def test_the_other_recipes_run_on_the_tiny_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    cli = command("fit", tmp_path, *OVERRIDES, config=f"{name}/dpo")
    assert cli.trainer.global_step == 1


def test_bad_input_ends_with_one_line(tmp_path):
    for overrides, words in [
        (["--model.beta=-1"], "beta -1.0 must be above 0"),
        (["--data.max_length=1000"], "data.max_length 1000 exceeds the model's 512 positions"),
        (["--data.format=alpaca"], "data.format"),
    ]:
        with pytest.raises(SystemExit) as end:
            run(lambda overrides=overrides: command("fit", tmp_path, *overrides))
        assert end.value.code.startswith("error: ")
        assert words in end.value.code
        assert "\n" not in end.value.code
