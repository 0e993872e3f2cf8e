"""Preference tuning to a model that merges, resuming, and the command line."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lit_adapters as la
from language.cli import LanguageCLI
from language.dpo.__main__ import main
from language.dpo.module import DPOTuner
from lit_adapters.lightning.cli import run
from tests.language.dpo.preferring import METHODS, PAIRS, built, data, tuner
from tests.language.tiny import CONFIGS, QUIET, batch, events, log_dir, trainer
from tests.tiers import fast_only


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


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
    learned = module.val_means.compute()
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
            betas.append(callback._annealing.beta)

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
        assert callback.state_dict()["annealing"]["means"]["5"][0] > math.log(2)
    rows = batch(9, 14)
    with torch.no_grad():
        before = module.eval()(rows)
        report = la.merge(module.model)
        assert len(report.merged) == 14
        assert not report.kept
        torch.testing.assert_close(module(rows), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", fast_only(["linear"], ["linear", "adaptive"]))
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
    counts = callback._recording._recorder.observer.counts
    once = [a.input_histogram(torch.zeros(1, size, 64)).sum() for _, a in la.adapters(module.model) for size in sizes]
    assert sum(c.sum() for c in counts.values()) == sum(once)


def test_predicting_continues_each_prompt_once(tmp_path):
    module = built(max_new_tokens=3)
    texts = trainer(tmp_path).predict(module, loader(batch(9, 6, 9, 8)))
    assert [len(group) for group in texts] == [2]


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
    "--model.model=tiny_llama",
    "--data.use_chat_template=false",
    "--data.batch_size=2",
    "--data.max_length=192",
    "--data.train_subset=4",
    "--data.val_subset=2",
    "--data.val_fraction=0.3",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=true",
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
