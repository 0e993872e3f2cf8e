"""Speculative decoding: its output is the target's, the counts are right, and the command line measures and writes."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from language.draft.decoding import Continuation, DecodingSettings, continued
from language.draft.speculative import _summary, first_turns, main, measure
from lit_adapters.lightning.cli import run
from tests.language.draft.drafting import METHODS, built, llama, tuner
from tests.language.tiny import data, moved, trainer

PROMPT = [5, 6, 7, 8]


def markov(seed, vocabulary=6):
    """A LLaMA whose next token depends on the last one only: attention and MLP add nothing."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.copy_(torch.randn_like(weight) * (1.0 if weight is model.model.embed_tokens.weight else 0.4))
    return model


def chances(model):
    """p(next | last), exactly, float64 (V, V)."""
    with torch.no_grad():
        return model(torch.arange(model.config.vocab_size)[:, None]).logits[:, 0].double().softmax(-1)


def chi_square(tokens, expected):
    """sum (observed - expected)^2 / expected over all transitions of a sequence."""
    counts = torch.zeros_like(expected)
    for last, following in itertools.pairwise(tokens):
        counts[last, following] += 1
    wanted = counts.sum(1, keepdim=True) * expected
    return ((counts - wanted) ** 2 / wanted).sum().item()


# The output is the target's


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("merged", [False, True])
def test_the_likeliest_tokens_are_the_targets_own(name, merged):
    """With adapters of every method in the draft, in float32."""
    module = moved(built(adapters=METHODS[name], init_seed=4))
    la.set_progress(module.model, 1.0)
    if merged:
        la.merge(module.model, unload=False)
    settings = DecodingSettings(max_new_tokens=24, draft_tokens=4)
    alone = continued(module.target, PROMPT, settings)
    assisted = continued(module.target, PROMPT, settings, draft=module.model)
    assert assisted.tokens == alone.tokens
    assert alone.passes == len(alone.tokens)
    assert (alone.proposed, alone.accepted) == (0, 0)
    assert assisted.passes + assisted.accepted == len(assisted.tokens)
    assert module.model.training  # as it was


def test_an_annealing_draft_proposes():
    module = moved(built(adapters=METHODS["afa"]))
    la.set_progress(module.model, 0.3)
    settings = DecodingSettings(max_new_tokens=12, draft_tokens=3)
    assert continued(module.target, PROMPT, settings, draft=module.model).tokens == (
        continued(module.target, PROMPT, settings).tokens
    )


def test_the_tokenizers_end_token_serves_models_whose_settings_have_none():
    target = markov(0)
    assert target.generation_config.eos_token_id is None
    settings = DecodingSettings(max_new_tokens=8, draft_tokens=2)
    free = continued(target, [0], settings).tokens
    end = free[3]
    for draft in (None, markov(1)):
        tokens = continued(target, [0], settings, draft=draft, end=end).tokens
        assert tokens == free[: free.index(end) + 1]


@pytest.mark.slow
def test_drawn_tokens_have_the_targets_distribution():
    """Chi-square of the transitions in a sequence: 30 degrees of freedom, standard deviation 8."""
    target, draft = markov(0), markov(1)
    p, q = chances(target), chances(draft)
    assert torch.minimum(p, q).sum(1).mean() < 0.8  # the draft is another distribution
    settings = DecodingSettings(max_new_tokens=900, draft_tokens=3, seed=1)
    found = continued(target, [0], settings, temperature=1.0, draft=draft)
    assert len(found.tokens) == 900
    assert 0.2 < found.accepted / found.proposed < 0.9
    statistic = chi_square([0, *found.tokens], p)
    assert statistic < 30 + 3 * 8
    assert chi_square([0, *found.tokens], q) > 200  # what accepting everything would have looked like


@pytest.mark.slow
def test_the_share_of_accepted_tokens_is_the_expected_one():
    """sum_v min(p, q), with one token proposed at a time, over the tokens after which proposals are made."""
    target, draft = markov(0), markov(1)
    p, q = chances(target), chances(draft)
    found = continued(target, [0], DecodingSettings(max_new_tokens=600, draft_tokens=1, seed=2), 1.0, draft)
    accepted = torch.minimum(p, q)
    # From one proposal to the next: past an accepted token to one of the target's own, or to a corrected token.
    step = accepted @ p + (p - accepted)
    often = torch.linalg.matrix_power(step, 100)[0]
    expected = (often * accepted.sum(1)).sum().item()
    error = math.sqrt(expected * (1 - expected) / found.proposed)
    assert error < 0.03
    assert found.accepted / found.proposed == pytest.approx(expected, abs=2.5 * error)


def test_draws_depend_on_the_seed_alone():
    target, draft = llama(), llama(layers=2)
    settings = DecodingSettings(max_new_tokens=10)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = continued(target, PROMPT, settings, 1.0, draft, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert continued(target, PROMPT, settings, 1.0, draft, seed=3).tokens == first.tokens
    assert continued(target, PROMPT, settings, 1.0, draft, seed=4).tokens != first.tokens


# The counts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_right(temperature):
    """21 tokens: three passes of five proposals and one of its own, and the end, where fewer are proposed."""
    target = llama()
    target.generation_config.eos_token_id = None
    found = continued(target, PROMPT, DecodingSettings(21, draft_tokens=5), temperature, copy.deepcopy(target))
    assert (found.passes, found.proposed, found.accepted) == (4, 17, 17)


def test_a_draft_that_is_always_wrong():
    target = llama()
    target.generation_config.eos_token_id = None
    wrong = copy.deepcopy(target)
    wrong.lm_head.weight = torch.nn.Parameter(-target.lm_head.weight.detach())
    found = continued(target, PROMPT, DecodingSettings(9, draft_tokens=3), draft=wrong)
    assert (found.passes, found.accepted) == (9, 0)
    assert found.proposed == 3 * 6 + 2 + 1
    assert found.tokens == continued(target, PROMPT, DecodingSettings(9)).tokens


def test_the_drafts_own_settings_come_back():
    target, draft = llama(), llama(layers=2)
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    before = [getattr(draft.generation_config, n) for n in names]
    continued(target, PROMPT, DecodingSettings(4), draft=draft)
    assert [getattr(draft.generation_config, n) for n in names] == before
    assert not target._forward_pre_hooks


def test_the_summary_of_several_prompts():
    alone = [Continuation([1, 2, 3], 3, 0, 1.0), Continuation([4, 5, 6, 7, 8], 5, 0, 2.0)]
    assisted = [Continuation([1, 2, 3], 1, 2, 0.5), Continuation([4, 5, 6, 9, 9], 3, 9, 4.0)]
    found = _summary(alone, assisted, exact=True)
    assert found["accepted length"].value == 8 / 4
    assert found["acceptance"].value == (2 + 2) / 11
    assert found["identical"].value == 0.5
    assert found["tokens/s"].value == pytest.approx(8 / 4.5)
    assert found["tokens/s alone"].value == pytest.approx(8 / 3)
    assert found["speedup"].value == pytest.approx((2.0 + 0.5) / 2)
    spread = math.sqrt(2 * ((3 - 2 * 1) ** 2 + (5 - 2 * 3) ** 2)) / 4
    assert found["accepted length"].stderr == pytest.approx(spread)
    assert "identical" not in _summary(alone, assisted, exact=False)


def test_measuring_both_temperatures():
    module = built(init_seed=4)
    found = measure(module.target, module.model, [PROMPT, [9, 10]], DecodingSettings(8, 3))
    assert list(found) == ["temperature 0", "temperature 1"]
    assert found["temperature 0"]["identical"].value == 1.0
    for values in found.values():
        assert 1 <= values["accepted length"].value <= 4
        assert 0 <= values["acceptance"].value <= 1
        assert values["tokens/s"].value > 0


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be a whole number, at least 1"),
        ({"draft_tokens": 0}, "draft_tokens 0 must be a whole number, at least 1"),
        ({"temperatures": (0.0, -1.0)}, "temperature -1.0 must be a finite number from 0 to 1000"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(la.AdapterError, match=message):
        DecodingSettings(**change)


def padded(model, rows=8):
    """The model with further rows of embeddings, as they are padded for speed; no token has them."""
    size, wider = model.config.vocab_size, copy.deepcopy(model)
    wider.resize_token_embeddings(size + rows, mean_resizing=False)
    with torch.no_grad():
        wider.get_output_embeddings().weight[size:] = 0.0
        wider.get_input_embeddings().weight[size:] = 0.0
    return wider


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which", ["draft", "target"])
def test_embeddings_that_are_padded_differently(which, temperature):
    models = {"target": llama(), "draft": llama(layers=2)}
    settings = DecodingSettings(max_new_tokens=24, draft_tokens=4)
    expected = continued(models["target"], PROMPT, settings, temperature, draft=models["draft"])
    models[which] = wider = padded(models[which])
    found = continued(models["target"], PROMPT, settings, temperature, draft=models["draft"])
    assert found.tokens == expected.tokens
    assert found.accepted == expected.accepted
    assert wider.config.vocab_size == 48
    assert wider(torch.tensor([PROMPT])).logits.shape[-1] == 48


def test_a_target_that_chooses_a_token_beyond_the_draft():
    target = padded(llama())
    with torch.no_grad():
        target.get_output_embeddings().weight[45] = 50 * target.get_output_embeddings().weight[:40].mean(0)
        target.get_output_embeddings().weight[46] = -target.get_output_embeddings().weight[45]
    with pytest.raises(la.AdapterError, match="chooses a token beyond the 40 of the draft"):
        continued(target, PROMPT, DecodingSettings(24), draft=llama(layers=2))


def test_what_cannot_be_continued():
    target = llama()
    with pytest.raises(la.AdapterError, match="a prompt has no tokens"):
        continued(target, [], DecodingSettings(4))
    with pytest.raises(la.AdapterError, match="a prompt of 4 tokens and max_new_tokens 61 exceed the context of 64"):
        continued(target, PROMPT, DecodingSettings(61))
    with pytest.raises(la.DataError, match="there are no prompts"):
        measure(target, llama(), [], DecodingSettings(4))


# The command line


def test_prompts_of_both_kinds(write):
    path = write([{"turns": ["one", "two"]}, {"prompt": "three"}, {"prompt": "four"}])
    assert first_turns(path) == ["one", "three", "four"]
    assert first_turns(path, 1) == ["one"]
    for bad in ({"question": "x"}, {"turns": []}, {"prompt": " "}):
        with pytest.raises(la.DataError, match="line 2: no prompt; give the row `turns`"):
            first_turns(write([{"prompt": "x"}, bad], "bad.jsonl"))


def test_the_command_line_measures_a_checkpoint(tmp_path, write, capsys):
    module = tuner(adapters=la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.5)))
    trainer(tmp_path).fit(module, datamodule=data(train_subset=8))
    prompts = write([{"turns": ["hello there", "again"]}, {"turns": ["what is this"]}])
    out = tmp_path / "result.json"
    main(
        [
            f"--ckpt={tmp_path / 'last.ckpt'}",
            f"--prompts={prompts}",
            f"--out={out}",
            "--limit=1",
            "--max_new_tokens=6",
            "--draft_tokens=2",
            "--temperatures=[0]",
            "--format=alpaca",
            "--device=cpu",
        ]
    )
    written = json.loads(out.read_text())
    assert written["results"]["temperature 0"]["metrics"]["identical"] == {"value": 1.0, "stderr": 0.0, "n": 1}
    assert written["merged"].startswith("merged 7 layers")
    assert written["settings"]["draft_tokens"] == 2
    assert "accepted length" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, write):
    prompts = write([{"prompt": "x"}])
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(b"PK")
    for ckpt, words in ((torn, "is torn"), (tmp_path / "none.ckpt", "does not exist")):
        with pytest.raises(SystemExit) as end:
            run(lambda c=ckpt: main([f"--ckpt={c}", f"--prompts={prompts}", f"--out={tmp_path / 'o.json'}"]))
        assert words in end.value.code
        assert "\n" not in end.value.code
