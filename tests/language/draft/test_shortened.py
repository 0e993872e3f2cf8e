"""The shortened model: the layers that stay, without a copy of any weight."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from language.draft.shortened import shortened
from tests.language.draft.drafting import llama


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
        ids,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
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


def test_a_model_without_one_list_of_layers():
    model = llama(layers=2)
    model.other = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.raises(la.AdapterError, match="LlamaForCausalLM has 2 lists of 2 layers"):
        shortened(model, [0])
