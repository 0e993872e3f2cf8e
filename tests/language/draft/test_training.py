"""Training and merging a draft leave the target alone; resuming, and the command line."""

from __future__ import annotations

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

import lit_adapters as la
from language.draft.__main__ import main
from language.draft.module import DraftTuner, merged_draft
from language.draft.shortened import check_layers
from language.module import CausalLMTuner, load_tuner
from tests.language.draft.drafting import METHODS, built, tuner
from tests.language.tiny import CONFIGS, QUIET, ROWS, batch, data, moved, quick_main, trainer


def values(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_training_leaves_the_target_alone_and_checkpoints_hold_the_adapters(tmp_path, name):
    module = tuner(adapters=METHODS[name])
    module.configure_model()
    before, start = values(module.target), module.model(**batch(9)).logits
    run = trainer(tmp_path)
    run.fit(module, datamodule=data())
    assert {"train/loss", "val/kl", "val/agreement", "val/acceptance"} <= run.callback_metrics.keys()
    assert_unchanged(module.target, before)
    assert not module.target.training
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    own = {f"model.{n}.{k}" for n, a in la.adapters(module.model) for k in a.adapter_tensors()}
    assert set(kept) == own
    loaded = DraftTuner.load_from_checkpoint(tmp_path / "last.ckpt")
    rows = batch(9, 14)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(rows), module.eval()(rows))
        assert not torch.equal(module.model(**batch(9)).logits, start)
    assert_unchanged(loaded.target, before)
    assert loaded.hparams["keep_layers"] == [1]


def test_a_draft_is_no_whole_model(tmp_path):
    trainer(tmp_path).fit(tuner(adapters=None, train=["lm_head"]), datamodule=data())
    with pytest.raises(la.AdapterError, match="is not a checkpoint of `python -m language fit`"):
        load_tuner(tmp_path / "last.ckpt", CausalLMTuner, "language")
    assert load_tuner(tmp_path / "last.ckpt", DraftTuner, "language.draft").hparams["keep_layers"] == [1]


@pytest.mark.parametrize("name", METHODS)
def test_merging_makes_a_model_of_its_own(tmp_path, name):
    """Annealing has ended at exactly 0; the merged draft is the draft; the target stays as it is."""
    module = tuner(adapters=METHODS[name])
    trainer(tmp_path).fit(module, datamodule=data())
    assert all(a.beta.item() == 0.0 for _, a in la.adapters(module.model) if a.schedule is not None)
    before, rows = values(module.target), batch(9, 14)
    with torch.no_grad():
        expected = module.eval()(rows)
        merged, report = merged_draft(module)
        assert len(report.merged) == 7 or name == "loran"
        found = merged(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(module(rows), expected)
    assert_unchanged(module.target, before)
    with pytest.raises(la.AdapterError, match="is also the whole model's, which merging would change"):
        la.merge(module.model)
    la.merge(module.model, unload=False)
    assert_unchanged(module.target, before)
    if name in ("lora", "afa"):
        merged.save_pretrained(tmp_path / "draft")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
        assert again.config.num_hidden_layers == 1
        with torch.no_grad():
            assert torch.equal(again(rows["input_ids"]).logits, merged(rows["input_ids"]).logits)


def test_a_nonlinear_draft_is_not_merged():
    with pytest.raises(la.AdapterError, match="is nonlinear at beta = 1"):
        merged_draft(moved(built(adapters=la.AFALoRA(rank=2))))


@pytest.mark.parametrize("train", [["norm"], ["lm_head"], ".*"])
def test_modules_that_train_are_the_drafts_own(tmp_path, train):
    module = tuner(adapters=None if train == ".*" else la.LoRA(rank=2), train=train)
    module.configure_model()
    before = values(module.target)
    trainer(tmp_path).fit(module, datamodule=data(train_subset=8))
    assert_unchanged(module.target, before)
    moved_on = [n for n, p in module.model.named_parameters() if n in before and p.requires_grad]
    assert moved_on
    assert all(not torch.equal(module.model.state_dict()[n], before[n]) for n in moved_on if "layers" not in n)


def test_a_target_of_its_own_name(tmp_path):
    module = tuner(keep_layers=None, target="tiny_llama")
    module.configure_model()
    before = values(module.target)
    trainer(tmp_path).fit(module, datamodule=data(train_subset=8))
    assert_unchanged(module.target, before)
    assert not {id(p) for p in module.model.parameters()} & {id(p) for p in module.target.parameters()}
    assert la.merge(module.model).merged


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_precisions(tmp_path, precision, quantization):
    module = tuner(quantization=quantization, dtype="bfloat16", gradient_checkpointing=True)
    run = trainer(tmp_path, precision=precision)
    run.fit(module, datamodule=data(train_subset=8))
    assert run.callback_metrics["val/kl"].dtype == torch.float32
    assert torch.isfinite(run.callback_metrics["val/kl"])
    whole = {id(p) for p in module.target.parameters()}
    bases = [p for p in module.model.parameters() if not p.requires_grad]
    assert all(id(p) in whole for p in bases)
    merged, _ = merged_draft(module)
    assert torch.isfinite(merged(batch(9)["input_ids"]).logits).all()


def test_moving_the_module_moves_the_target():
    module = built()
    module.to(torch.float64)
    assert {p.dtype for p in module.target.parameters()} == {torch.float64}
    assert all(
        p is q for p, q in zip(module.target.model.norm.parameters(), module.model.model.norm.parameters(), strict=True)
    )
    assert module.target.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any("target" in name for name, _ in module.named_modules())


@pytest.mark.slow
def test_the_adaptive_schedule_follows_the_distillation_loss(tmp_path, monkeypatch):
    """beta falls with the loss, stands while it rises, and is exactly 0 at the end."""
    betas = {}
    for rising in (False, True):
        adaptive = la.schedules.Adaptive(duration=0.3, end=0.9, window=5)
        module = tuner(adapters=la.AFALoRA(rank=2, schedule=adaptive))
        module.configure_model()
        seen = betas.setdefault(rising, [])
        (*_, adapter) = (a for _, a in la.adapters(module.model))
        if rising:
            own = module._losses
            module._losses = lambda b, own=own, seen=seen: own(b) * 3.0 ** len(seen)
        module.on_train_batch_end = lambda *args, seen=seen, adapter=adapter: seen.append(adapter.beta.item())
        trainer(tmp_path / str(rising), max_epochs=4).fit(module, datamodule=data(batch_size=2))
        assert adapter.beta.item() == 0.0
        merged_draft(module)
    assert betas[True][len(betas[True]) // 4] > 0.8 > betas[False][len(betas[False]) // 4]


@pytest.mark.parametrize("name", ["afa", "loran"])
def test_resuming_in_mid_epoch_is_exact(tmp_path, name):
    def run(folder, **changes):
        dropped = {"afa": la.AFALoRA(rank=2, dropout=0.3), "loran": la.LoRAN(rank=2, dropout=0.3)}
        module = tuner(adapters=dropped[name], init_seed=3)
        torch.manual_seed(1)
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        run = trainer(folder, max_epochs=2, accumulate_grad_batches=2, callbacks=[la.AdapterCallback(), saver])
        run.fit(module, datamodule=data(packing="buckets", batch_size=2), **changes)
        return module, run

    whole, first = run(tmp_path / "whole")
    stopped = tmp_path / "whole" / "step=2.ckpt"
    again, second = run(tmp_path / "again", ckpt_path=stopped)
    assert second.global_step == first.global_step > 4
    ours, theirs = values(whole), values(again)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    moments = [r.optimizers[0].state_dict()["state"] for r in (first, second)]
    assert all(torch.equal(v, moments[1][i][k]) for i, s in moments[0].items() for k, v in s.items())
    assert first.callback_metrics["val/kl"] == second.callback_metrics["val/kl"]


@pytest.mark.slow
def test_the_command_line_fits_and_tests(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["draft"])
    monkeypatch.chdir(tmp_path)
    recipe = [f"--config={CONFIGS / 'smoke/draft.yaml'}", f"--data.path={ROWS}", *QUIET]
    fitted = quick_main(
        ["fit", *recipe, f"--trainer.logger.init_args.save_dir={tmp_path}"], entry=main, trainer_defaults={}
    )
    assert fitted.trainer.global_step == 4
    path = next(tmp_path.rglob("last.ckpt"))
    tested = quick_main(["test", *recipe, f"--ckpt_path={path}", "--trainer.logger=false"], entry=main)
    measured = {k: v.item() for k, v in tested.trainer.callback_metrics.items()}
    assert measured.keys() == {"test/kl", "test/agreement", "test/acceptance"}
    loaded = DraftTuner.load_from_checkpoint(path)
    assert measured == pytest.approx(tested.trainer.test(loaded, datamodule=tested.datamodule, verbose=False)[0])


OVERRIDES = [
    "--model.model=tiny_llama",
    "--model.target=null",
    "--model.keep_layers=[1]",
    "--model.adapters.rank=2",
    "--data.format=alpaca",
    "--data.use_chat_template=false",
    "--data.batch_size=4",
    "--data.max_length=400",
    "--data.train_subset=4",
    "--data.val_subset=2",
    "--data.val_fraction=0.2",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=true",
]


@pytest.mark.parametrize("name", ["smollm2/draft", "llama3_8b/draft"])
def test_the_other_recipes_run_on_the_tiny_model(tmp_path, monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["draft"])
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    cli = quick_main(["fit", f"--config={CONFIGS / name}.yaml", f"--data.path={ROWS}", *QUIET, *OVERRIDES], entry=main)
    assert cli.trainer.global_step == 1
    assert "val/kl" in cli.trainer.callback_metrics
    assert recipe["lr_scheduler"]["init_args"]["max_lr"] == recipe["optimizer"]["init_args"]["lr"]
    if "keep_layers" in recipe["model"]:
        assert check_layers(recipe["model"]["keep_layers"], 30)
