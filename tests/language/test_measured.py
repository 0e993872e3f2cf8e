"""What models do with packed and padded rows is measured, and what does not hold is refused or done another way."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lit_adapters as la
from language import measured
from language import module as module_file
from language.draft.decoding import DecodingSettings, continued
from language.draft.shortened import shortened
from language.evaluate.likelihood import TokenQuestion, score_tokens
from language.generate import continuations
from language.loss import token_losses
from language.measured import check_packing, ignores_left_padding
from tests.families import FAMILIES
from tests.language.test_module import loader, packed
from tests.language.tiny import built, data, trainer, tuner

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"state_size": 4},
    "recurrent_gemma": {},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64},
    "roberta": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "cohere2": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "head_dim": 8},
    "olmo": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
CASES = [n for n, f in FAMILIES.items() if f.inputs.keys() == {"input_ids"} and "classifier" not in f.train]
CASES.remove("transformers xlnet")  # not causal
EVERY = [*CASES, *OTHERS]
# Those in which a document of a packed row sees the one before it, or has other positions than alone.
SEEN = {"bloom", "mpt", "opt", "mamba", "rwkv", "lfm2", "gpt_oss", "falcon_mamba", "recurrent_gemma", "xglm", "biogpt"}
SEEN |= {"openai-gpt", "roberta", "bert-generation"}
QUICK = {f"transformers {n}" for n in ("llama", "gpt2", "mixtral", "bloom", "mpt", "opt", "mamba", "lfm2", "gpt_oss")}
QUICK |= {"mistral", "gemma2", "xglm", "roberta"}
PADDED = {"rwkv", "recurrent_gemma", "roberta"}  # those that need rows without padding on the left


class Tokenizer:
    """All that `continuations` asks a tokenizer."""

    pad_token_id, eos_token_id = 0, None


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in FAMILIES:
        return FAMILIES[name].make().eval()
    config = transformers.AutoConfig.for_model(name, **_SIZES | OTHERS[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_documents_of_a_packed_row_stay_apart_or_packing_is_refused(name):
    """In full and in half precision, against two documents of which the first one is exchanged."""
    network = model(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    first, other, second = torch.randint(5, 60, (3, 1, 7))
    positions = torch.arange(7).repeat(2)[None]
    rows = [torch.cat([before, second], 1) for before in (first, other)]
    batches = [{"input_ids": row, "labels": row.clone(), "position_ids": positions} for row in rows]
    seen = name.removeprefix("transformers ") in SEEN
    for precision in (torch.float32, torch.bfloat16):
        network = network.to(precision)
        measured._known.clear()
        if seen:
            with pytest.raises(la.AdapterError, match=f"in {type(network).__name__}: .*packing to buckets"):
                token_losses(network, batches[0])
            continue
        losses = [token_losses(network, b)[0][-6:] for b in batches]
        assert (losses[0] - losses[1]).abs().max() < (1e-5 if precision == torch.float32 else 0.1)


@pytest.mark.parametrize("name", sorted({"transformers rwkv", "recurrent_gemma", "transformers llama", "roberta"}))
def test_padding_on_the_left_is_left_out_where_the_model_reads_it(name):
    network = model(name)
    assert ignores_left_padding(network) == (name.removeprefix("transformers ") not in PADDED)


def test_a_measurement_leaves_no_trace():
    """Neither the mode, the random state nor the hooks of adapters; the second packed batch measures nothing."""
    module = built(adapters=[la.LoRA(rank=2, dropout=0.5), la.NoRA(groups=4)])
    module.train()
    seen, passes = [], []
    for _, adapter in la.adapters(module.model):
        adapter.register_forward_pre_hook(lambda *args: seen.append(1))
    module.model.register_forward_pre_hook(lambda *args: passes.append(1))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_packing(module.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seen
    assert all(m.training for m in module.model.modules())
    count = len(passes)
    assert 0 < count <= 4
    token_losses(module.model, packed(4, 3))
    assert len(passes) == count + 1
    assert seen


@pytest.mark.parametrize("head", ["whole", "kept"])
def test_packed_rows_are_one_row_for_flash_attention(head):
    """Flash attention tells documents apart in batches of one row only."""
    module = built()
    rows = [packed(7, 5, seed=1), packed(4, 8, seed=2)]
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    class Flash(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = module.model, copy.copy(module.model.config)
            self.config._attn_implementation = "flash_attention_2"

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, logits_to_keep=0, **rest):
            assert len(input_ids) == 1
            return self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep, **rest)

    class Whole(Flash):
        def forward(self, input_ids, **rest):
            return super().forward(input_ids, **rest)

    found, learned = token_losses({"whole": Whole, "kept": Flash}[head](), together)
    expected = [token_losses(module.model, row) for row in rows]
    torch.testing.assert_close(found, torch.cat([losses for losses, _ in expected]), rtol=1e-5, atol=1e-5)
    assert torch.equal(learned, torch.cat([tokens for _, tokens in expected]))


def test_packing_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """By a run on packed data, and with a plain loader by the first batch."""
    config = transformers.BloomConfig(vocab_size=259, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2)
    monkeypatch.setattr(module_file, "create_model", lambda *args, **options: transformers.BloomForCausalLM(config))
    for settings in ({"datamodule": data(packing="packed")}, {"train_dataloaders": loader(packed(5, 6))}):
        module = tuner()
        with pytest.raises(la.AdapterError, match="in BloomForCausalLM: the losses of a document move by"):
            trainer(tmp_path).fit(module, **settings)
        assert module.learned_tokens == 0
    trainer(tmp_path).fit(tuner(), datamodule=data(packing="buckets", train_subset=8))


@pytest.mark.parametrize("kind", [transformers.BertLMHeadModel, transformers.RobertaForCausalLM])
def test_a_model_that_sees_later_tokens_is_refused(kind):
    settings = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
    for is_decoder in (True, False):
        network = kind(kind.config_class(**settings, is_decoder=is_decoder, initializer_range=0.2)).eval()
        if is_decoder:
            measured.check_causal(network)
            continue
        with pytest.raises(la.AdapterError, match=f"{kind.__name__} predicts a token from those after it"):
            measured.check_causal(network)


@pytest.mark.parametrize("name", ["transformers rwkv", "transformers bloom", "xglm", "recurrent_gemma"])
def test_rows_of_different_lengths_are_continued_and_scored_as_alone(name):
    network = model(name)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    prompts = [[9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33, 34]]
    if name != "recurrent_gemma":  # transformers' cache does not take two recurrent layers without attention
        tokens = continuations(network, Tokenizer, prompts, 5, 0.0)
        for prompt, row in zip(prompts, tokens, strict=True):
            alone = continuations(network, Tokenizer, [prompt], 5, 0.0)[0].tolist()
            assert row.tolist() == alone + [0] * (len(row) - len(alone))
    questions = [TokenQuestion(prompt, [[5], [6, 7, 8], [40, 3]]) for prompt in prompts]
    for question, row in zip(questions, score_tokens(network, questions), strict=True):
        for continuation, score in zip(question.continuations, row, strict=True):
            tokens = torch.tensor([question.context + continuation])
            with torch.no_grad():
                logp = network(tokens, use_cache=False).logits[0].double().log_softmax(-1)
            places = range(len(question.context) - 1, tokens.shape[1] - 1)
            assert score.log_likelihood == pytest.approx(
                sum(logp[i, tokens[0, i + 1]].item() for i in places), abs=1e-4
            )


@pytest.mark.parametrize("name", ["transformers mamba", "transformers gemma2", "transformers lfm2", "falcon_mamba"])
def test_a_shortened_model_is_the_whole_one_without_the_other_layers(name):
    network = model(name)
    assert shortened(network, [1]).config.num_hidden_layers == 1


class Numbered(LlamaDecoderLayer):
    """A layer that does more the later it comes."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = super().forward(*args, **kwargs)
        return hidden + self.self_attn.layer_idx * hidden.roll(1, -1)


def test_layers_that_depend_on_their_numbers_are_refused():
    network = model("transformers llama")
    for layer in network.model.layers:
        layer.__class__ = Numbered
    shortened(network, [0])
    with pytest.raises(la.AdapterError, match=r"with the layers \[1\] alone is not the model without the others"):
        shortened(network, [1])


@pytest.mark.parametrize("name", ["transformers rwkv", "transformers mamba", "transformers llama"])
def test_rows_of_one_length_are_continued_as_alone(name):
    """RWKV in transformers 5.24 mixes the rows of a batch when it goes on from its state."""
    network, tokenizer = model(name), SimpleNamespace(pad_token_id=0, eos_token_id=None)
    prompts = [[7, 8, 9], [20, 21, 22], [33, 5, 6]]
    together = continuations(network, tokenizer, prompts, 6, 0.0)
    for row, prompt in zip(together, prompts, strict=True):
        alone = continuations(network, tokenizer, [prompt], 6, 0.0)
        assert row.tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", ["transformers mamba", "transformers rwkv", "openai-gpt"])
def test_models_without_a_cache_of_tokens_do_not_decode_with_a_draft(name):
    network = model(name)
    with pytest.raises(la.AdapterError, match="cannot decode with the draft"):
        continued(network, [7, 8, 9], DecodingSettings(max_new_tokens=4, draft_tokens=2), draft=network)
