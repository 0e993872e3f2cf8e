"""Drafts: the shortened model, the distillation loss, and that training and merging leave the target alone."""

import copy

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.utilities import dim_zero_sum
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from language import draft as module
from language.distillation import DraftQuality, agreement
from language.draft import DraftTuner, main, merged_draft
from language.loss import learned_tokens
from language.shortened import check_layers, shortened
from lit_adapters.callback import build_optimizers
from tests.language.tiny import ADAMW, CONFIGS, QUIET, ROWS, batch, data, moved, quick_main, trainer

METHODS = {
    "lora": la.LoRA(rank=2),
    "dora": la.DoRA(rank=2),
    "nora_plus_plus": la.NoRAPlusPlus(nora=la.NoRA(groups=4, base="anchored"), lora=la.LoRA(rank=2)),
    "loran": la.LoRAN(rank=2),
    "afa": la.AFALoRA(rank=2, activation="silu", schedule=la.schedules.Linear(end=0.6)),
}


def tuner(**changes):
    """A draft of the second layer of the tiny LLaMA, ready for a Trainer."""
    module = DraftTuner(**{"model": "tiny_llama", "keep_layers": [1], "adapters": la.LoRA(rank=2)} | changes)
    module.configure_optimizers = lambda: build_optimizers(module, ADAMW)
    return module


def built(**changes):
    module = tuner(**changes)
    module.configure_model()
    return module


def values(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def llama(layers=5):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)  # so that layers matter
    return model


# The shortened model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shortened_model_is_the_model_without_the_other_layers(kind):
    """Against a model of that size made from scratch, read at once and token by token with a cache."""
    torch.manual_seed(0)
    if kind == "llama":
        model, prefix = llama(), "model.layers"
        short = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})).eval()
    else:
        config = GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=5, n_head=2)
        model, prefix = GPT2LMHeadModel(config).eval(), "transformer.h"
        short = GPT2LMHeadModel(GPT2Config(**{**config.to_dict(), "n_layer": 3})).eval()
    keep = [1, 2, 4]
    state = {n: v for n, v in model.state_dict().items() if not n.startswith(prefix)}
    for new, old in enumerate(keep):
        start = f"{prefix}.{old}."
        state |= {n.replace(start, f"{prefix}.{new}."): v for n, v in model.state_dict().items() if n.startswith(start)}
    short.load_state_dict(state)
    made = shortened(model, keep)
    ids = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = short(ids).logits
        assert torch.equal(made(ids).logits, expected)
        assert not torch.allclose(model(ids).logits, expected)
    out = made.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        anew = short(out.sequences).logits[0, 8:-1]
    torch.testing.assert_close(torch.cat(out.logits), anew, rtol=1e-4, atol=1e-4)
    assert model.config.num_hidden_layers == 5


def test_a_shortened_model_has_the_parameters_of_the_whole_one_and_a_copy_its_own():
    model = llama()
    short = shortened(model, [0, 3])
    whole = {id(p) for p in model.parameters()}
    assert all(id(p) in whole for p in short.parameters())
    assert short.lm_head.weight is short.model.embed_tokens.weight
    assert not {id(p) for p in copy.deepcopy(short).parameters()} & whole
    assert not {id(m) for m in short.modules()} & {id(m) for m in model.modules()}


def test_kinds_of_layers_are_those_of_the_layers_that_stay():
    model = llama()
    model.config.layer_types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert shortened(model, [1, 2, 3]).config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], r"keep_layers is empty; name at least one of the model's layers, 0 to 1"),
        ([0, 2], r"keep_layers names layer 2; the model has the layers 0 to 1"),
        ([-1], r"keep_layers names layer -1; the model has the layers 0 to 1"),
        ([1, 0], r"keep_layers \[1, 0\] must ascend, each layer once; give \[0, 1\]"),
        ([1, 1], r"keep_layers \[1, 1\] must ascend, each layer once; give \[1\]"),
    ],
)
def test_layers_that_cannot_be_kept(keep, message):
    with pytest.raises(la.AdapterError, match=message):
        built(keep_layers=keep)


def test_a_draft_that_would_be_its_target():
    with pytest.raises(la.AdapterError, match="set keep_layers to the layers that it has, or target"):
        tuner(keep_layers=None)


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr(DraftTuner, "device_mesh", "a mesh")
    with pytest.raises(la.AdapterError, match=r"cannot be sharded: set trainer\.strategy to auto or ddp"):
        built()


def test_a_model_without_one_list_of_layers():
    model = llama(layers=2)
    model.other = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.raises(la.AdapterError, match="LlamaForCausalLM has 2 lists of 2 layers"):
        shortened(model, [0])


def test_another_tokenizer_is_refused(monkeypatch, tokenizer):
    own = module.create_tokenizer
    monkeypatch.setattr(module, "create_tokenizer", lambda name: tokenizer if name == "other" else own(name))
    with pytest.raises(la.AdapterError, match=r"'tiny_llama' has another tokenizer than the target 'other': token"):
        built(target="other")


def test_another_number_of_token_ids_is_refused(monkeypatch):
    own = module.CausalLMTuner._create

    def create(self, name):
        return own(self, name) if name == "tiny_llama" else llama()

    monkeypatch.setattr(module.CausalLMTuner, "_create", create)
    monkeypatch.setattr(module, "check_vocabulary", lambda target, draft: None)
    with pytest.raises(la.AdapterError, match="'tiny_llama' has 259 token ids, the target 'other' 40"):
        built(target="other")


# The loss


def test_the_measures_are_their_formulas():
    torch.manual_seed(0)
    target, draft = 3 * torch.randn(7, 11, dtype=torch.float64), 3 * torch.randn(7, 11, dtype=torch.float64)
    draft[0] = target[0] + 5.0
    draft.requires_grad_()
    found = agreement(target, draft)
    p, q = (logits.detach().exp() / logits.detach().exp().sum(-1, keepdim=True) for logits in (target, draft))
    torch.testing.assert_close(found.kl, (p * (p / q).log()).sum(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.acceptance, 1 - 0.5 * (p - q).abs().sum(-1), rtol=1e-9, atol=1e-12)
    assert found.greedy.tolist() == [float(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)]
    assert found.kl[0].item() == pytest.approx(0.0, abs=1e-12)
    assert found.acceptance[0].item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(found.kl.sum(), draft)
    torch.testing.assert_close(gradient, q - p, rtol=1e-9, atol=1e-12)


def test_the_loss_compares_the_draft_with_the_target_at_the_learned_tokens():
    """Against both models' logits at all positions, in float64, dropout in the draft and none in the target."""
    module = moved(built(adapters=la.LoRA(rank=2))).double()
    rows = batch(12, 7, 9)
    learned = learned_tokens(rows)[:, 1:]
    with torch.no_grad():
        p, q = (m(**{k: rows[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1][learned].softmax(-1)
                for m in (module.target, module.model))  # fmt: skip
    expected = (p * (p / q).log()).sum(-1)
    assert module.training_step(rows, 0).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    module.training_step(rows, 0).backward()
    assert all((p.grad is not None) == p.requires_grad for p in module.parameters())
    assert all(p.grad is None for p in module.target.parameters())


def test_measures_are_exact_over_uneven_batches(tmp_path):
    module = moved(built())
    batches = [batch(30, 12), batch(5), batch(9, 9)]
    with torch.no_grad():
        found = [module.eval()._compare(b) for b in batches]
    run = trainer(tmp_path)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    for split, evaluate in (("val", run.validate), ("test", run.test)):
        expected = {
            f"{split}/{name}": torch.cat([getattr(f, field) for f in found]).mean().item()
            for name, field in (("kl", "kl"), ("agreement", "greedy"), ("acceptance", "acceptance"))
        }
        assert evaluate(module, loader, verbose=False)[0] == pytest.approx(expected, rel=1e-5)


def test_measures_add_up_over_processes():
    torch.manual_seed(0)
    parts = [agreement(torch.randn(n, 6), torch.randn(n, 6)) for n in (3, 5)]
    together, apart = DraftQuality(), [DraftQuality(), DraftQuality()]
    for part, metric in zip(parts, apart, strict=True):
        together.update(part)
        metric.update(part)
    assert all(reduction is dim_zero_sum for reduction in together._reductions.values())
    apart[0].kl, apart[0].tokens = apart[0].kl + apart[1].kl, apart[0].tokens + apart[1].tokens
    assert apart[0].compute()["kl"].item() == pytest.approx(together.compute()["kl"].item())


# Training


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
    assert all(p is q for p, q in zip(module.target.model.norm.parameters(), module.model.model.norm.parameters(),
                                      strict=True))  # fmt: skip
    assert module.target.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any("target" in name for name, _ in module.named_modules())


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
            own = module._loss
            module._loss = lambda b, own=own, seen=seen: (own(b)[0] * 3.0 ** len(seen), own(b)[1])
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


# The command line


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
    *("--model.model=tiny_llama", "--model.target=null", "--model.keep_layers=[1]", "--model.adapters.rank=2"),
    *("--data.format=alpaca", "--data.use_chat_template=false", "--data.batch_size=4", "--data.max_length=400"),
    *("--data.train_subset=4", "--data.val_subset=2", "--data.val_fraction=0.2", "--trainer.accelerator=cpu"),
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
