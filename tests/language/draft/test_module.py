"""Drafts: the distillation loss, its measures, and what is refused."""

from __future__ import annotations

import pytest
import torch

import lit_adapters as la
from language.draft import module
from language.draft.distillation import agreement
from language.draft.module import DraftTuner
from language.loss import learned_tokens
from tests.language.draft.drafting import built, llama, tuner
from tests.language.tiny import batch, moved, trainer


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
        p, q = (
            m(**{k: rows[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1][learned].softmax(-1)
            for m in (module.target, module.model)
        )
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
    with pytest.raises(la.AdapterError, match=r"has 259 tokens, the draft 'tiny_llama' 259 rows .* 'other' 40"):
        built(target="other")


@pytest.mark.parametrize("padded", ["draft", "target"])
def test_rows_that_pad_embeddings_change_no_loss(padded):
    target, draft = torch.randn(5, 40), torch.randn(5, 40)
    logits = {"target": target, "draft": draft}
    expected = agreement(target, draft)
    logits[padded] = torch.cat([logits[padded], 9 + torch.randn(5, 8)], 1)
    found = agreement(logits["target"], logits["draft"])
    assert torch.equal(found.kl, expected.kl)
    assert torch.equal(found.greedy, expected.greedy)
    assert torch.equal(found.acceptance, expected.acceptance)
