"""Tied weights, and parameters that were unfrozen, between our format and that of peft."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import lit_adapters as la

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, **settings)).eval()


def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits


def trained(model, targets, train):
    la.attach(model, la.LoRA(rank=2, targets=targets), train=train)
    move(model)
    return model


@torch.no_grad()
def move(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


CASES = [
    (llama, ["q_proj"], ["embed_tokens", "lm_head"]),
    (llama, ["q_proj", "lm_head"], []),
    (bert, ["query"], ["word_embeddings", "cls"]),
]


@pytest.mark.parametrize(("build", "targets", "train"), CASES)
def test_tied_weights_are_the_same_in_peft_and_back(build, targets, train, tmp_path):
    model = trained(build(), targets, train)
    la.export_peft(model, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(), tmp_path).eval()), logits(model))
    back = build()
    la.import_peft(back, tmp_path)
    assert torch.equal(logits(back), logits(model))


def test_weights_that_peft_trained_apart_do_not_become_one(tmp_path):
    la.export_peft(trained(llama(), *CASES[0][1:]), tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    move(theirs)
    theirs.save_pretrained(tmp_path)
    fresh = llama()
    with pytest.raises(la.AdapterError, match=r"are tied in LlamaForCausalLM, and .* has two values"):
        la.import_peft(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(llama()))


def test_what_was_unfrozen_is_exported(tmp_path):
    model = trained(llama(), ["q_proj"], [])
    model.model.norm.requires_grad_(True)
    move(model)
    la.export_peft(model, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))


def test_a_trained_module_at_two_places_is_refused(tmp_path):
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    la.attach(model, la.LoRA(rank=2, targets=["c"]), train=["a", "b"])
    with pytest.raises(la.AdapterError, match="'a' trains and stands at several places"):
        la.export_peft(model, tmp_path)
