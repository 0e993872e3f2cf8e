"""The tuner: its loss, what it reads and refuses, and that what was trained is found again."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import lit_adapters as la
from language.loss import learned_tokens, token_losses
from language.module import CausalLMTuner
from tests.language.tiny import batch, built, data, moved, trainer, tuner


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


def packed(*lengths, seed=0):
    """The documents of `batch(*lengths)` in one row."""
    rows = batch(*lengths, seed=seed)
    cut = {k: torch.cat([r[:n] for r, n in zip(v, lengths, strict=True)])[None] for k, v in rows.items()}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": cut["input_ids"], "labels": cut["labels"], "position_ids": positions}


# Loss


def test_the_loss_is_that_of_transformers():
    module, rows = moved(built()), batch(12, 7, 9)
    expected = module.model(**rows).loss
    assert module.training_step(rows, 0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_packed_documents_do_not_see_each_other():
    module = moved(built()).eval()
    lengths = (11, 5, 8)
    row, rows = packed(*lengths), batch(*lengths)
    with torch.no_grad():
        together, apart = module(row)[0], module(rows)
        expected = torch.cat([apart[i, :n] for i, n in enumerate(lengths)])
        assert torch.allclose(together, expected, atol=1e-5)
        losses = [module._losses(b) for b in (row, rows)]
    assert len(losses[0]) == len(losses[1]) == sum(n - n // 3 for n in lengths)
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_packed_document_is_not_learned():
    row = packed(4, 3)
    row["labels"] = row["input_ids"].clone()
    assert learned_tokens(row).tolist() == [[False, True, True, True, False, True, True]]


def without_logits_to_keep(forward, input_ids, attention_mask, position_ids, use_cache):
    return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize("rows", [batch(12, 7, 9), packed(4, 3, 6)], ids=["padded", "packed"])
def test_logits_of_learned_tokens_alone_give_the_same_loss_and_gradient(monkeypatch, rows):
    """Against the logits of all positions, in float64; and a model without `logits_to_keep` computes those."""
    module = moved(built()).double()
    learned = learned_tokens(rows)
    expected = F.cross_entropy(module(rows)[:, :-1][learned[:, 1:]], rows["labels"][learned], reduction="sum")
    weight = module.model.model.layers[0].mlp.up_proj.lora_B
    (reference,) = torch.autograd.grad(expected, weight)
    widths = []
    module.model.lm_head.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    for fewer in (True, False):
        if not fewer:
            monkeypatch.setattr(
                module.model, "forward", functools.partial(without_logits_to_keep, module.model.forward)
            )
        losses, found = token_losses(module.model, rows)
        assert torch.equal(found, learned)
        assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(losses.sum(), weight)
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)
    assert widths[0] == int(learned[:, 1:].any(0).sum()) < widths[1] == rows["input_ids"].shape[1]


def test_how_the_model_is_called():
    module = built()
    seen = []
    module.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    row, rows = packed(4, 3), batch(4, 3)
    for step in (module.training_step, module.validation_step, module.test_step):
        for given in (row, rows):
            step(given, 0)
            args, kwargs = seen.pop()
            assert (args, kwargs["use_cache"]) == ((), False)
            assert kwargs["attention_mask"] is given.get("attention_mask")
            assert kwargs["position_ids"] is given.get("position_ids")


class Items(Callback):
    """What `test_step` returns, batch by batch."""

    def __init__(self):
        self.outputs = []

    def on_test_batch_end(self, trainer, pl_module, outputs, *rest):
        self.outputs.append(outputs)


@pytest.mark.parametrize("split", ["val", "test"])
def test_losses_are_exact_over_uneven_batches(tmp_path, split):
    module = moved(built())
    batches = [batch(30, 12), batch(5), packed(9, 9, 4)]
    batches[0]["labels"][1] = -100  # a row without a learned token has no loss
    with torch.no_grad():
        losses = [module.eval()._losses(b).double() for b in batches]
    documents = [losses[0], losses[1], *losses[2].split([6, 6, 3])]  # those with learned tokens
    loss, rows = torch.cat(losses).mean(), [row.mean().item() for row in documents]
    items = Items()
    run = trainer(tmp_path, callbacks=[items])
    evaluate = run.validate if split == "val" else run.test
    measured = evaluate(module, loader(*batches), verbose=False)[0]
    expected = {"loss": loss.item(), "perplexity": math.exp(loss), "row_loss": sum(rows) / 5}
    assert measured == pytest.approx({f"{split}/{name}": value for name, value in expected.items()}, rel=1e-5)
    assert abs(expected["loss"] - expected["row_loss"]) > 1e-3 * expected["loss"]
    if split == "test":
        assert torch.cat([found["row_loss"] for found in items.outputs]).tolist() == pytest.approx(rows, rel=1e-5)
    assert evaluate(module, loader(batches[1]), verbose=False)[0][f"{split}/loss"] == pytest.approx(
        losses[1].mean().item(), rel=1e-5
    )


def test_a_loss_that_is_no_number_is_not_left_out(tmp_path):
    module = built()
    with torch.no_grad():
        list(la.adapters(module.model))[-1][1].lora_B.fill_(float("nan"))
    measured = trainer(tmp_path).validate(module, loader(batch(5)), verbose=False)[0]
    assert math.isnan(measured["val/loss"])


# Training


def test_gradient_checkpointing_gives_the_same_gradients():
    rows, gradients = batch(12, 7), []
    for checkpointing in (False, True):
        both = la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2))
        module = built(gradient_checkpointing=checkpointing, init_seed=1, adapters=both)
        torch.manual_seed(5)
        moved(module)
        recomputed = []
        norm = module.model.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_, seen=recomputed: seen.append(1))
        module.training_step(rows, 0).backward()
        assert len(recomputed) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
        assert len(gradients[-1]) == 2 * 4 + 14 * 2
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(g.any() for g in gradients[1].values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_precisions(tmp_path, precision, quantization):
    methods = [la.NoRA(groups=4, base="anchored"), la.LoRA(rank=2, dropout=0.1)]
    dtype = "float32" if precision == "32-true" else "bfloat16"
    module = tuner(adapters=methods, quantization=quantization, dtype=dtype, gradient_checkpointing=True)
    run = trainer(tmp_path, precision=precision)
    run.fit(module, datamodule=data(packing="packed"))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert run.callback_metrics["val/loss"] < 6
    assert run.callback_metrics["val/loss"].dtype == torch.float32
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for v in kept.values() if v.is_floating_point()} == {torch.float32}
    assert {k.split(".")[-1] for k in kept} >= {"lora_A", "lora_B"}
    assert not any("proj.weight" in k for k in kept)


def test_a_model_trains_in_training_mode(tmp_path):
    modes = []
    module = tuner(adapters=la.LoRA(rank=2, dropout=0.1))
    module.configure_model()
    module.model.register_forward_pre_hook(lambda m, args: modes.append({x.training for x in m.modules()}))
    trainer(tmp_path).fit(module, datamodule=data(train_subset=8))
    assert modes[0] == modes[-1] == {False}  # validation
    assert {True} in modes
    assert {True, False} not in modes


def test_late_positions_survive_the_cast_to_bfloat16():
    """As transformers loads it in bfloat16: frequencies of 32 bit."""
    module = built(adapters=None, init_seed=3)
    reference = LlamaForCausalLM(module.model.config)
    reference.load_state_dict(module.model.state_dict())
    for name, parameter in reference.named_parameters():
        reference.get_submodule(name.rpartition(".")[0])._parameters["weight"] = torch.nn.Parameter(
            parameter.bfloat16()
        )
    rows = batch(500)
    with torch.no_grad():
        expected = reference.eval()(rows["input_ids"], use_cache=False).logits
        module.eval().to(torch.bfloat16)
        assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(module(rows), expected)
    assert copy.deepcopy(module).model.lm_head.weight.dtype == torch.bfloat16


def test_calibration_reads_training_batches_without_generating(tmp_path):
    """Packed rows, which cannot be continued."""
    module = tuner(adapters=la.NoRA(groups=4, fit_range="calibrate", targets=["layers.0.mlp.act_fn"]))
    trainer(tmp_path).fit(module, datamodule=data(packing="packed"))
    assert not any(a.awaits_calibration for _, a in la.adapters(module.model))


def test_tokens_are_counted_and_the_count_goes_on(tmp_path):
    given = data()
    given.setup("fit")
    per_epoch = sum(int(learned_tokens(b).sum()) for b in given.train_dataloader())
    module = tuner()
    run = trainer(tmp_path)
    run.fit(module, datamodule=data())
    assert module.learned_tokens == per_epoch == run.callback_metrics["train/learned_tokens"]
    again = tuner(init_seed=module.hparams["init_seed"])
    trainer(tmp_path, max_epochs=2).fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    assert again.learned_tokens == 2 * per_epoch


# What was trained is found again

METHODS = {
    "nora": la.NoRA(groups=4, rank=2),
    "calibrated": la.NoRA(groups=4, base="anchored", fit_range="calibrate", targets=["layers.0.mlp.act_fn"]),
    "lists": [la.LoRAN(rank=2, function="sine", targets=["q_proj"]), la.DoRA(rank=2, targets=["up_proj"])],
    "form": {"class_path": "lit_adapters.LoRA", "init_args": {"rank": 2}},
    "afa": la.AFALoRA(rank=2, activation="rational", schedule=la.schedules.Cosine(end=1.0)),
    "none": None,
}


@pytest.mark.parametrize("name", [*METHODS, "nf4", "full"])
def test_what_python_trained_loads_in_python(tmp_path, name):
    changes = {"adapters": METHODS.get(name, la.LoRA(rank=2)), "train": ["norm"]}
    if name == "nf4":
        changes["quantization"] = "nf4"
    if name == "full":
        changes |= {"adapters": None, "train": ".*"}
    module, rows = tuner(**changes), batch(9, 14)
    trainer(tmp_path).fit(module, datamodule=data(train_subset=8))
    seed_everything(123, verbose=False)
    loaded = CausalLMTuner.load_from_checkpoint(tmp_path / "last.ckpt")
    fresh = built(**changes | {"init_seed": module.hparams["init_seed"]})
    with torch.no_grad():
        assert torch.equal(loaded.eval()(rows), module.eval()(rows))
        assert not torch.equal(fresh.eval()(rows), module(rows))
    assert loaded.learned_tokens == module.learned_tokens > 0


def test_all_random_values_depend_on_the_seed_alone():
    def values(seed, **changes):
        seed_everything(seed, verbose=False)
        module = tuner(**changes)
        torch.rand(3)
        before = torch.get_rng_state()
        module.configure_model()
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for p in module.parameters()])

    assert torch.equal(values(1), values(1))
    assert not torch.equal(values(1), values(2))
    assert torch.equal(values(1, init_seed=7), values(2, init_seed=7))


def test_the_model_is_built_once():
    module = built()
    model, report = module.model, module.report
    module.configure_model()
    assert module.model is model
    assert module.report is report


def test_an_attach_that_fails_leaves_no_model_behind():
    module = tuner(adapters=la.LoRA(rank=1000))
    for _ in range(2):
        with pytest.raises(la.AdapterError, match=r"rank 1000 exceeds the size of 'model\.layers\.0.self_attn.q_proj'"):
            module.configure_model()


# Predicting


def test_predicting_continues_prompts(tmp_path):
    module = moved(built(max_new_tokens=5))
    texts = trainer(tmp_path).predict(module, loader(batch(9, 6), batch(4)))
    assert [len(group) for group in texts] == [2, 1]
    assert texts[0] == module.predict_step(batch(9, 6), 0)
    assert all(isinstance(text, str) for group in texts for text in group)
    with pytest.raises(la.DataError, match="packed rows hold several prompts"):
        trainer(tmp_path).predict(module, loader(packed(4, 3)))


# What is refused


def fit(module, folder, *batches):
    trainer(folder).fit(module, loader(*batches))


def test_a_batch_without_anything_to_learn(tmp_path):
    masked = batch(9, 6)
    masked["labels"][:, 1:] = -100
    masked["labels"][:, 0] = 5  # nothing comes before it
    with pytest.raises(la.DataError, match="all labels of a batch of 2 rows are masked"):
        fit(tuner(), tmp_path, masked)
    with pytest.raises(la.DataError, match="are masked"):
        trainer(tmp_path).validate(tuner(), loader(masked), verbose=False)


def test_tokens_of_another_model(tmp_path):
    foreign = batch(9, 6)
    foreign["input_ids"][1, 2] = 259
    with pytest.raises(la.DataError, match="token 259 is outside the model's vocabulary of 259"):
        fit(tuner(), tmp_path, foreign)


def test_a_tokenizer_of_another_model(tmp_path, tokenizer):
    module = tuner()
    module.on_train_batch_start = lambda *args: pytest.fail("training has begun")
    with pytest.raises(la.DataError, match=r"tokenizer has 400 tokens, the model's vocabulary 259: .* 'tiny_llama'"):
        trainer(tmp_path).fit(module, datamodule=data(tokenizer=tokenizer))


def test_sequences_that_are_too_long(tmp_path):
    with pytest.raises(la.DataError, match="a sequence of 513 tokens is longer than the model's 512 positions"):
        fit(tuner(), tmp_path, batch(513))
    fit(tuner(), tmp_path, packed(300, 212), packed(500, 100))
    with pytest.raises(la.DataError, match="a sequence of 513 tokens"):
        fit(tuner(), tmp_path, packed(5, 513))
    with pytest.raises(la.DataError, match=r"data\.max_length 513 exceeds the model's 512 positions"):
        trainer(tmp_path).fit(tuner(), datamodule=data(max_length=513))


def test_whole_fine_tuning_of_packed_weights_is_refused():
    with pytest.raises(la.AdapterError, match=r"torch\.uint8, which cannot train"):
        built(adapters=None, train=".*", quantization="nf4")
