"""What a model was trained with travels with its weights, and is used without being named again."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_adapters as la
from language.__main__ import main
from language.data import InstructionDataModule
from language.dpo.data import PreferenceDataModule
from language.evaluate.run import load
from language.evaluate.settings import EvalSettings, as_trained
from language.evaluate.tasks import read_questions
from language.generate import generate, prompt_rows
from language.meaning import apply_meaning, check_meaning
from language.models import create_model, create_tokenizer
from language.module import CausalLMTuner
from language.prompt import prompt_tokens
from lit_adapters.cli.commands import main as commands
from lit_adapters.errors import AdapterError
from lit_adapters.files.meaning import meaning_of
from tests.language.dpo import preferring
from tests.language.grpo import rewarding
from tests.language.tiny import trainer, tuner
from tests.mutations import STRANGE, json_edits

TEMPLATE = "Q {prompt} A"
TRAINED = {"end_token": "<s>", "prompt_template": TEMPLATE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meaning")


@pytest.fixture(scope="module")
def rows(folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": c, "response": c * 3}) + "\n" for c in "abcdefgh"))
    (folder / "news.jsonl").write_text('{"text": "x", "label": "b"}\n{"text": "y", "label": "a"}\n' * 2)
    return str(folder / "rows.jsonl")


def module(rows, **changes):
    settings = {"format": "pairs", "val_fraction": 0.0, "test_path": rows, "max_length": 64}
    return InstructionDataModule(rows, "tiny_llama", **settings | changes)


@pytest.fixture(scope="module")
def checkpoint(folder, rows):
    """A fit of two steps with an end token and a template of its own."""
    model = tuner()
    trainer(folder, max_steps=2).fit(model, module(rows, **TRAINED))
    return next(folder.glob("last*.ckpt")), model


def ends(model):
    own = model.generation_config.eos_token_id
    return own if isinstance(own, list) else [own]


def test_the_checkpoint_knows_and_predict_uses_it(checkpoint, rows):
    path, _ = checkpoint
    loaded = CausalLMTuner.load_from_checkpoint(path, map_location="cpu")
    meaning = meaning_of(loaded.model)
    assert {"format": "pairs", "use_chat_template": False, **TRAINED}.items() <= meaning.items()
    assert (ends(loaded.model), loaded.tokenizer.eos_token) == ([256, 257], "<s>")
    expected = list(loaded.tokenizer("Q b A")["input_ids"])
    assert prompt_tokens(loaded.tokenizer, "b", None, None, 99, meaning) == expected
    given = module(rows)
    quiet = {"callbacks": [la.AdapterCallback()], "enable_checkpointing": False}
    texts = trainer(path.parent, **quiet).predict(tuner(), given, ckpt_path=path, weights_only=True)
    assert (given.prompt_template, given.end_token) == (TEMPLATE, "<s>")
    (ids, _), *_ = given.test_dataloader().dataset[1]
    assert ids.tolist() == [*expected, *loaded.tokenizer("bbb")["input_ids"], 256]
    assert [len(batch) for batch in texts] == [8]


@pytest.mark.parametrize(
    "setting",
    [{"end_token": "</s>"}, {"prompt_template": "{prompt}"}, {"use_chat_template": True}, {"format": "chat"}],
)
def test_a_contradiction_at_use_is_an_error(checkpoint, rows, setting):
    path, _ = checkpoint
    model = CausalLMTuner.load_from_checkpoint(path, map_location="cpu")
    given = module(rows, **setting)
    (name,) = setting
    with pytest.raises(AdapterError, match="trained with (format|use_chat_template)" if name == "format" else name):
        given.adopt(meaning_of(model.model), "the checkpoint")
    with pytest.raises(AdapterError, match="trained with"):
        prompt_tokens(model.tokenizer, "b", "chat", None, 99, meaning_of(model.model))


def test_generate_and_evaluate_use_it(checkpoint, capsys):
    path, _ = checkpoint
    said = main(["generate", f"--ckpt={path}", "--prompt=b", "--max_new_tokens=5", "--device=cpu"])
    loaded = CausalLMTuner.load_from_checkpoint(path, map_location="cpu")
    row = loaded.tokenizer("Q b A")["input_ids"]
    assert said == generate(loaded.model, loaded.tokenizer, [row], max_new_tokens=5)[0]
    model, tokenizer = load(None, ckpt=str(path))
    settings = as_trained(EvalSettings(), meaning_of(model))
    assert (settings.chat, settings.perplexity_format, tokenizer.eos_token) == (False, "pairs", "<s>")
    with pytest.raises(AdapterError, match="trained with use_chat_template False, but True is asked for"):
        as_trained(EvalSettings(chat=True), meaning_of(model))


def test_adapter_directories_and_merged_models_use_it(checkpoint, folder):
    path, trained = checkpoint
    la.save_adapters(trained.model, folder / "adapter")
    base = copy.deepcopy(trained.model)
    la.detach(base)
    base.save_pretrained(folder / "base")
    create_tokenizer("tiny_llama").save_pretrained(folder / "base")
    model, tokenizer = load(str(folder / "base"), adapters=str(folder / "adapter"))
    assert (ends(model), tokenizer.eos_token) == ([256, 257], "<s>")

    commands(["merge", str(path), "--out", str(folder / "merged")])
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert ends(plain) == [256, 257]
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token == "<s>"
    assert meaning_of(create_model(str(folder / "merged"))) == meaning_of(trained.model)

    maker = "transformers.AutoModelForCausalLM.from_pretrained"
    options = ["--base", maker, "--base-args", json.dumps([str(folder / "base")])]
    commands(["merge", str(folder / "adapter"), *options, "--out", str(folder / "both")])
    assert ends(AutoModelForCausalLM.from_pretrained(folder / "both")) == [256, 257]


def merged_base(checkpoint, place):
    """The merged weights of the fit, whose meaning says pairs and a template."""
    if not place.exists():
        commands(["merge", str(checkpoint[0]), "--out", str(place)])
    return str(place)


@pytest.mark.parametrize("kind", ["chat", "dpo", "grpo"])
def test_training_goes_on_from_merged_weights_with_data_of_another_kind(checkpoint, folder, kind, tmp_path, write):
    """Resume, load, validate, generate and merge go by the checkpoint, whatever its base was trained on."""
    base = merged_base(checkpoint, folder / "base of others")
    shared = {"enable_checkpointing": True}
    if kind == "chat":
        said = [[{"role": "user", "content": c}, {"role": "assistant", "content": c * 2}] for c in "abcdefgh"]
        path = write([{"messages": messages} for messages in said])
        make = partial(InstructionDataModule, path, base, "chat", max_length=64, val_fraction=0.25)
        model = partial(tuner, model=base)
    elif kind == "dpo":
        make = partial(preferring.data, tokenizer=base)
        model = partial(preferring.tuner, model=base)
    else:
        make = partial(rewarding.questions, tokenizer=base)
        model = partial(rewarding.tuner, model=base)
    trained = model()
    trainer(tmp_path, max_steps=2, **shared).fit(trained, make())
    path = next(tmp_path.glob("last*.ckpt"))
    found = meaning_of(trained.model)
    assert found["use_chat_template"] == (kind == "chat")
    trainer(tmp_path, max_steps=3, **shared).fit(model(), make(), ckpt_path=path, weights_only=True)
    given, loaded = make(), model()
    quiet = {"callbacks": [la.AdapterCallback()], "enable_checkpointing": False}
    trainer(tmp_path, **quiet).validate(loaded, given, ckpt_path=path, weights_only=True)
    assert meaning_of(loaded.model) == found
    assert meaning_of(type(trained).load_from_checkpoint(path, map_location="cpu").model) == found
    assert isinstance(main(["generate", f"--ckpt={path}", "--prompt=b", "--max_new_tokens=2", "--device=cpu"]), str)
    commands(["merge", str(path), "--out", str(tmp_path / "out")])
    assert meaning_of(create_model(str(tmp_path / "out"))) == found


def test_an_untrained_model_goes_by_its_base(checkpoint, folder, rows, tmp_path):
    base = merged_base(checkpoint, folder / "base of others")
    quiet = {"callbacks": [la.AdapterCallback()], "enable_checkpointing": False}
    given = module(rows)
    trainer(tmp_path, **quiet).test(tuner(model=base), given)
    assert given.prompt_template == TEMPLATE
    with pytest.raises(AdapterError, match="the model was trained with prompt_template"):
        trainer(tmp_path, **quiet).test(tuner(model=base), module(rows, prompt_template="{prompt}"))
    trainer(tmp_path, **quiet).validate(preferring.tuner(model=base), preferring.data(tokenizer=base))


def test_generation_asks_as_preferences_of_plain_dialogues_do(tmp_path, write):
    turns = "\n\nHuman: {}\n\nAssistant: {}"
    path = write([{"chosen": turns.format(c, c * 2), "rejected": turns.format(c, c * 3)} for c in "abcdefgh"])
    given = PreferenceDataModule(path, "tiny_llama", max_length=64, batch_size=2)
    model = preferring.tuner()
    trainer(tmp_path, max_steps=1, check_val_every_n_epoch=None, val_check_interval=None).fit(model, given)
    meaning = meaning_of(model.model)
    prompt = prompt_rows(next(iter(given.train_dataloader())))[0]
    asked = model.tokenizer.decode(prompt).removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    assert prompt_tokens(model.tokenizer, asked, None, None, 99, meaning) == prompt


def test_an_answer_ends_before_its_end_token_whatever_kind_it_is():
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    la.files.meaning.set_meaning(model, {"end_token": "!", "end_token_ids": [0]})
    apply_meaning(model, tokenizer)
    assert (ends(model)[0], tokenizer.eos_token) == (tokenizer.convert_tokens_to_ids("!"), "</s>")
    with torch.no_grad():
        model.lm_head.weight.zero_()[ends(model)[0]] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    assert generate(model, tokenizer, [[1, 2]], max_new_tokens=4) == [""]


def test_classes_are_those_of_the_training(folder, rows):
    given = InstructionDataModule(str(folder / "news.jsonl"), "tiny_llama", "classification", val_fraction=0.0)
    meaning = given.meaning()
    assert meaning["classes"] == ["a", "b"]
    wider = meaning | {"classes": ["a", "b", "c"]}
    given.adopt(wider, "the checkpoint")
    assert given.classes == ["a", "b", "c"]
    tokenizer, settings = create_tokenizer("tiny_llama"), EvalSettings(classification="news.jsonl")
    asked = read_questions("classification", tokenizer, folder, settings, wider)
    assert (asked[0].choices, asked[0].answer) == (("a", "b", "c"), "b")
    with pytest.raises(la.DataError, match="line 1: class 'b' is none of those that the model was trained with: a"):
        read_questions("classification", tokenizer, folder, settings, meaning | {"classes": ["a", "c"]})


def test_edited_meanings_are_refused_or_used(rows):
    good = module(rows, **TRAINED).meaning()
    edits = [edited for _, edited in json_edits(good, 60)] + [good | {name: v} for name in good for v in STRANGE[:14]]
    refused = 0
    for edited in edits:
        if not isinstance(edited, dict):
            continue
        try:
            module(rows).adopt(edited, "the checkpoint")
        except AdapterError:
            refused += 1
    assert 40 < refused < len(edits)
    with pytest.raises(AdapterError, match="its meaning gives end_token_ids as"):
        check_meaning({"end_token_ids": [True]}, "x")


def test_a_template_from_a_file_may_only_name_fields(rows):
    for template in ("{prompt:>99999999999}", "{prompt!r}", "{prompt.__class__}", "{prompt[0]}"):
        with pytest.raises(AdapterError, match="prompt_template"):
            module(rows).adopt({"format": "pairs", "prompt_template": template}, "x")
