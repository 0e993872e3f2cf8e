"""Log-likelihoods of choices: against plain, uncached, one-row-at-a-time computations."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import lit_adapters as la
from language.evaluate.likelihood import Score, _measured_reader, likeliest, score_tokens
from language.evaluate.prompts import Prompt, PromptEncoder, TokenQuestion
from language.models import context_length
from lit_adapters.errors import AdapterError, DataError

MERGES = [("a", "b"), ("c", "d"), ("Ġ", "A"), ("Ġ", "B"), ("ab", "cd"), (":", "x")]


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Bytes with a few merges; puts <s> first, and </s> last, if `bos`."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $0 </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama(**changes):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    settings = {"vocab_size": 270, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128} | sizes
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    ).eval()


def mistral():
    config = LlamaConfig().to_diff_dict() | llama().config.to_dict() | {"sliding_window": 8}
    config.pop("model_type")
    return MistralForCausalLM(MistralConfig(**config)).eval()


@torch.no_grad()
def plain(model, context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context) from one uncached pass over one unpadded row."""
    logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0].double().log_softmax(-1)
    start = len(context) - 1
    return sum(logits[start + i, token].item() for i, token in enumerate(continuation))


def scored(model, tokenizer, prompts, choices, batch_size=8, max_length=None):
    """Log-likelihoods of each prompt's choices, and the number of prompts that were truncated."""
    encoder = PromptEncoder(tokenizer, max_length or context_length(model))
    questions = [encoder.question(Prompt((prompt,)), options) for prompt, options in zip(prompts, choices, strict=True)]
    rows = score_tokens(model, questions, batch_size)
    return [[score.log_likelihood for score in row] for row in rows], encoder.truncated


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


EXAMPLES = "Q: one plus one?\nA: two\n\nQ: two plus two?\nA: four\n\n"
PROMPTS = ["Q: why\nA:", EXAMPLES + "Q: three\nA:", EXAMPLES + "Q: how long is this\nA:", "A:", EXAMPLES + "Q\nA:"]
CHOICES = [
    [" A", " B"],
    [" three", " 3", " it is long", "ab", "zy", " w z"],
    [" A"],
    [" A", " B", " no"],
    [" yes", " A"],
]


@pytest.mark.parametrize("build", [llama, gpt2, mistral])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_plain_computation(build, batch_size):
    model, tokenizer = build(), make_tokenizer()
    found, truncated = scored(model, tokenizer, PROMPTS, CHOICES, batch_size=batch_size)
    for prompt, choices, row in zip(PROMPTS, CHOICES, found, strict=True):
        context = [0, *ids(tokenizer, prompt)]
        expected = [plain(model, context, ids(tokenizer, choice)) for choice in choices]
        assert row == pytest.approx(expected, abs=1e-4)
        assert max(expected) < -0.1
    assert truncated == 0


def test_adapted_model():
    model, tokenizer = llama(), make_tokenizer()
    before = scored(model, tokenizer, PROMPTS, CHOICES)[0]
    la.attach(model, [la.LoRAN(rank=2), la.NoRA(groups=4)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    after = scored(model, tokenizer, PROMPTS, CHOICES, batch_size=4)[0]
    assert all(module.training for module in model.modules())
    model.eval()
    expected = plain(model, [0, *ids(tokenizer, PROMPTS[1])], ids(tokenizer, " it is long"))
    assert after[1][2] == pytest.approx(expected, abs=1e-4)
    assert abs(after[1][2] - before[1][2]) > 1e-2


def test_reads_each_prompt_once():
    """Work, counted in tokens: examples once, each question once, and each choice's tokens but the last."""
    model, tokenizer = llama(), make_tokenizer(bos=False)
    _measured_reader(model)  # of each model once
    fed = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: fed.append(tuple(args[0].shape)))
    examples, questions = EXAMPLES, ["Q: three\nA:", "Q: fives\nA:"]
    scored(model, tokenizer, [examples + q for q in questions], [[" xyz", " A"]] * 2)
    shared = len(ids(tokenizer, examples + "Q: "))
    assert fed == [(1, shared), (2, len(ids(tokenizer, questions[0])) - 3), (2, 3)]
    fed.clear()
    scored(model, tokenizer, ["Q:", "R:"], [[" A", " B"]] * 2)
    assert fed == [(2, 2)]
    fed.clear()
    scored(model, tokenizer, ["Q:", "R:"], [[f" x{i}" for i in range(7)], [" A"]])
    assert fed == [(2, 2), (7, 2)]
    fed.clear()
    scored(model, tokenizer, ["Q:"], [[f" x{i}" for i in range(7)]])
    assert fed == [(1, 2), (4, 2), (3, 2)]


def test_choices_do_not_change_the_tokens_of_the_prompt():
    model, tokenizer = llama(), make_tokenizer()
    assert ids(tokenizer, "Q:abcd") != ids(tokenizer, "Q:ab") + ids(tokenizer, "cd")
    ((first, second),), _ = scored(model, tokenizer, ["Q:ab"], [["cd", "x"]])
    context = [0, *ids(tokenizer, "Q:ab")]
    assert first == pytest.approx(plain(model, context, ids(tokenizer, "cd")), abs=1e-4)
    assert second == pytest.approx(plain(model, context, ids(tokenizer, "x")), abs=1e-4)


def test_start_tokens():
    model, with_start, without = llama(), make_tokenizer(), make_tokenizer(bos=False)
    written = scored(model, with_start, ["<s>Q:"], [[" A"]])[0][0][0]
    assert written == pytest.approx(plain(model, [0, *ids(without, "Q:")], ids(without, " A")), abs=1e-4)
    bare = scored(model, without, ["Q:"], [[" A"]])[0][0][0]
    assert bare == pytest.approx(plain(model, ids(without, "Q:"), ids(without, " A")), abs=1e-4)
    empty = scored(model, without, [""], [["ab"]])[0][0][0]
    assert empty == pytest.approx(plain(model, [0], ids(without, "ab")), abs=1e-4)


@pytest.mark.parametrize("bos", [True, False])
def test_long_prompts_lose_their_beginning(bos):
    model, tokenizer = llama(), make_tokenizer(bos)
    prompt = "x" * 200 + "y" * 30
    found, truncated = scored(model, tokenizer, [prompt, "Q:"], [[" A", " zzz"], [" A", " B"]], max_length=40)
    assert truncated == 1
    room = 40 - 3 - bos
    context = [0] * bos + ids(tokenizer, prompt)[-room:]
    expected = [plain(model, context, ids(tokenizer, choice)) for choice in (" A", " zzz")]
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert scored(model, tokenizer, [prompt], [[" A"]])[1] == 1  # the model has 128 positions
    with pytest.raises(DataError, match="9 tokens after the prompt do not fit into max_length=8"):
        scored(model, tokenizer, ["Q:"], [[" A", " zzzzzzzz"]], max_length=8)


@torch.no_grad()
@pytest.mark.parametrize("build", [llama, mistral])
def test_greedy_answers(build):
    """A continuation is greedy if each of its tokens is the likeliest; the first of equal ones is the likeliest."""
    model, tokenizer = build(), make_tokenizer()
    context, expected = [0, *ids(tokenizer, "Q: why\nA:")], []
    for _ in range(3):
        expected.append(model(torch.tensor([context + expected])).logits[0, -1].argmax().item())
    other = [*expected[:2], (expected[2] + 1) % 270]
    question = TokenQuestion(context, [expected, other, expected[:1], other[2:]])
    (row,) = score_tokens(model, [question])
    assert [score.greedy for score in row] == [True, False, True, other[2] == expected[0]]
    assert likeliest([Score(-2.0, False), Score(-1.0, False), Score(-1.0, True)]) == 1


def test_errors():
    model, tokenizer = llama(), make_tokenizer()
    with pytest.raises(DataError, match="choice '' after prompt"):
        scored(model, tokenizer, ["Q:"], [[" A", ""]])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(AdapterError, match="is not a number"):
        scored(model, tokenizer, ["Q:"], [[" A"]])
