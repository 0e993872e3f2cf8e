"""Continuations: the cache changes nothing but the cost, and a row does not see its neighbours' padding."""

from __future__ import annotations

import pytest
import torch

import lit_adapters as la
from language.generate import generate, prompt_rows
from language.models import create_model, create_tokenizer
from lit_adapters.methods import loran
from tests.language.tiny import batch, built, data, moved, trainer, tuner

PROMPTS = [[10, 20, 30, 40, 50], [60, 70], [80, 90, 100]]


@pytest.fixture(scope="module")
def tokenizer():
    return create_tokenizer("tiny_llama")


@pytest.fixture
def model():
    """Its likeliest tokens are no special ones, and vary."""
    model = create_model("tiny_llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.lm_head.weight[256:] = 0
    return model


@torch.no_grad()
def by_hand(model, prompt, steps):
    """The likeliest token each time, all tokens read anew."""
    tokens = torch.tensor([prompt])
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", [None, la.LoRA(rank=2), la.LoRAN(rank=2), la.AFALoRA(rank=2), la.NoRA(groups=4)])
def test_the_likeliest_tokens(model, tokenizer, method):
    la.attach(model, method)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = [tokenizer.decode(by_hand(model, prompt, 12)) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert len(set(expected)) == 3


def test_the_models_own_settings_change_nothing_but_the_end(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.repetition_penalty = 9.0
    own = model.generation_config
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert model.generation_config is own


def test_a_row_ends_at_the_end_token(model, tokenizer):
    expected = by_hand(model, PROMPTS[0], 12)
    cut = expected.index(expected[5])
    model.generation_config.eos_token_id = expected[5]
    text = generate(model, tokenizer, [PROMPTS[0]], max_new_tokens=12)[0]
    assert text == tokenizer.decode(expected[: cut + 1])


def test_temperature(model, tokenizer):
    def drawn(temperature):
        return generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=temperature)

    torch.manual_seed(1)
    one = drawn(1.0)
    torch.manual_seed(1)
    assert drawn(1.0) == one
    assert drawn(1.0) != one
    assert drawn(1e-4) == drawn(0.0)


def test_loran_forms_its_weights_once(model, tokenizer, monkeypatch):
    formed = []

    def counted(*args):
        formed.append(args)
        return merged_weight(*args)

    merged_weight = loran.merged_weight
    monkeypatch.setattr(loran, "merged_weight", counted)
    la.attach(model, la.LoRAN(rank=2, targets=["q_proj", "v_proj"]))
    generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert len(formed) == 4  # two blocks of two layers
    generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert len(formed) == 4
    model.train()
    generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert len(formed) == 8


def test_the_mode_comes_back(model, tokenizer):
    for mode in (True, False):
        model.train(mode)
        generate(model, tokenizer, PROMPTS, max_new_tokens=1)
        assert model.training is mode


def test_dropout_is_off():
    module = moved(built(adapters=la.LoRA(rank=2, dropout=0.9)))
    texts = {generate(module.model, module.tokenizer, PROMPTS, max_new_tokens=8)[0] for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must be a finite number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be a whole number"),
        ({"max_new_tokens": 510}, "a prompt of 5 tokens and max_new_tokens 510 exceed the context of 512"),
        ({"prompts": [[1], []]}, "a prompt has no tokens"),
    ],
)
def test_bad_arguments(model, tokenizer, settings, words):
    with pytest.raises(la.AdapterError, match=words):
        generate(model, tokenizer, **{"prompts": PROMPTS} | settings)


def test_rows_that_learn_their_prompts_do_not_say_where_they_end(tmp_path):
    with pytest.raises(la.DataError, match="mask_prompt=false learns prompts too"):
        trainer(tmp_path).predict(tuner(), datamodule=data(mask_prompt=False, test_fraction=0.25))


def test_prompts_of_a_batch():
    rows = batch(9, 6)
    ids = rows["input_ids"].tolist()
    assert prompt_rows(rows) == [ids[0][:3], ids[1][:2]]
    rows["labels"][1] = -100
    assert prompt_rows(rows)[1] == ids[1][:6]
    del rows["labels"]
    assert prompt_rows(rows) == [ids[0], ids[1][:6]]
    del rows["attention_mask"]
    with pytest.raises(la.DataError, match=r"set data\.packing to none"):
        prompt_rows(rows)
