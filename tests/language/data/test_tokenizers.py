"""Training text is what inference sees, for tokenizers of every kind: prompts, seams, control tokens in the text."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from language.data.control import ControlTokens, unguarded
from language.data.formats import FORMATS, parse
from language.data.module import InstructionDataModule
from language.data.rows import Row
from language.data.templates import _Beside
from language.dpo.data import PreferenceDataModule
from language.grpo.data import QuestionDataModule
from language.loss import IGNORED
from language.prompt import prompt_tokens
from tests.language.conftest import CHAT, SENTENCES, SPECIAL, make_tokenizer
from tests.language.data.test_formats import ALPACA, ORCA, SUMMARY, TALK

LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "\u2581"]
CONVERSATION = [turn | {"content": f"{turn['content']} the fox"} for turn in TALK]
ROWS = {
    "alpaca": ALPACA | {"input": "the quick "},
    "openorca": ORCA,
    "chat": {"messages": CONVERSATION},
    "summarisation": SUMMARY,
    "classification": {"text": "the fox", "label": "what"},
    "pairs": {"prompt": "what is it?", "response": "  the fox\n    jumps "},
}
NO_TOKENS = (  # nothing between the turns that a tokenizer keeps apart
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPACED = (  # as Mistral's
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def wrapped(tokenizer, **changes):
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "chat_template": CHAT} | changes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", initial_alphabet=LETTERS
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return wrapped(tokenizer)


def legacy_llama():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], initial_alphabet=LETTERS)
    tokenizer.train_from_iterator([sentence.replace(" ", " \u2581") for sentence in SENTENCES], trainer)
    return wrapped(tokenizer, bos_token="<s>")


def spaced_bytes():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unsplit():
    """Byte pairs over whole texts: merges reach across every seam."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], initial_alphabet=LETTERS)
    tokenizer.train_from_iterator(["what is it?\n the fox assistant: the fox\nthe\n\nfox", *SENTENCES], trainer)
    return wrapped(tokenizer)


def words(model, trainer, pre_tokenizer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([*SENTENCES, "a </s> b <|done|> c"], trainer)
    return wrapped(tokenizer)


def post_processed(template):
    tokenizer = make_tokenizer(bos_token="<s>")
    named = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return tokenizer


def stripping():
    """Control tokens that take in the white space beside them, as Phi-3's."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", rstrip=True, special=True, normalized=False)])
    return tokenizer


SPECIALS = ["<unk>", *SPECIAL]
KINDS = {
    "bytes": make_tokenizer,
    "bytes that begin with a space": spaced_bytes,
    "sentencepiece, always": lambda: unigram("always"),
    "sentencepiece, first": lambda: unigram("first"),
    "sentencepiece, never": lambda: unigram("never"),
    "legacy llama": legacy_llama,
    "unsplit": unsplit,
    "word pieces": lambda: words(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "words": lambda: words(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIALS),
        pre_tokenizers.WhitespaceSplit(),
    ),
    "adds the end token": lambda: post_processed("$A </s>"),
    "adds the begin token": lambda: post_processed("<s> $A"),
    "strips": stripping,
}
LOSSLESS = [kind for kind in KINDS if kind not in ("word pieces", "words")]
made = cache(lambda kind: KINDS[kind]())


def fitted(write, kind, rows, name, **settings):
    settings = {"format": name, "val_fraction": 0.0, "max_length": 2000} | settings
    data = InstructionDataModule(write(rows), made(kind), **settings)
    data.setup("fit")
    return data


def documents(data):
    return [row[0] for row in data.train_dataloader().dataset]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_begins_with_the_tokens_of_its_prompt(write, kind, name):
    for settings in ({}, {"use_chat_template": True}, {"use_chat_template": True, "chat_template": NO_TOKENS}):
        if name == "chat" and not settings:
            continue
        data = fitted(write, kind, [ROWS[name]], name, **settings)
        ((ids, labels),), (example,) = documents(data), data.examples("train")
        prompt = data.encoder.prompt(example)
        assert ids[: len(prompt)].tolist() == prompt
        assert labels[len(prompt)] == ids[len(prompt)]
        assert labels[len(prompt) - 1] == IGNORED
        if kind in LOSSLESS and kind != "strips":
            answer = made(kind).decode(ids, clean_up_tokenization_spaces=False)[len(made(kind).decode(prompt)) :]
            assert answer.removesuffix("</s>").rstrip() == example.response.rstrip()


@pytest.mark.parametrize("kind", ["sentencepiece, always", "sentencepiece, first", "legacy llama"])
def test_an_answer_in_the_middle_of_a_text_has_no_space_of_its_own(write, kind):
    """With Mistral's template the answer has the one space that the template writes, as in plain transformers."""
    tokenizer = made(kind)
    data = fitted(write, kind, [{"messages": CONVERSATION[1:]}], "chat", chat_template=SPACED)
    ((ids, _),) = documents(data)
    joint = tokenizer(data.renderer._render(tuple((m["role"], m["content"]) for m in CONVERSATION[1:]), _Beside("")))
    assert ids.tolist() == joint["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_control_token_stays_text(write, kind):
    tokenizer = made(kind)
    spelled = "a </s> b <|turn|> c</s>"
    contents = [turn | {"content": f"{turn['content']} {spelled}"} for turn in TALK]
    rows = {
        "pairs": ({"prompt": spelled, "response": spelled}, {}, 1, 0),
        "alpaca": ({"instruction": spelled, "input": spelled, "output": spelled}, {"use_chat_template": True}, 2, 2),
        "chat": ({"messages": contents}, {}, 5, 5),
    }
    end, turn = tokenizer.convert_tokens_to_ids(["</s>", "<|turn|>"])
    for name, (row, settings, ends, turns) in rows.items():
        data = fitted(write, kind, [row], name, **settings)
        ((ids, labels),), (example,) = documents(data), data.examples("train")
        assert (ids == end).sum() == ends
        assert (ids == turn).sum() == turns
        assert (labels == end).sum() == (2 if name == "chat" else 1)
        prompt = data.encoder.prompt(example)
        assert ids[: len(prompt)].tolist() == prompt
        assert spelled in example.prompt
        assert example.response.endswith(spelled)
        if kind in LOSSLESS:
            assert spelled in tokenizer.decode(ids[len(prompt) :], clean_up_tokenization_spaces=False)


def test_rows_without_such_text_have_the_tokens_they_always_had(write):
    """Piece by piece, for tokenizers that put nothing before a text."""
    tokenizer = made("bytes")
    for name, row in ROWS.items():
        data = fitted(write, "bytes", [row], name)
        ((ids, _),) = documents(data)
        pieces = data.renderer.pieces(parse([Row(row, "")], name)[0][0])
        alone = [token for piece in pieces for token in tokenizer(piece.text, add_special_tokens=False)["input_ids"]]
        assert ids.tolist() == (alone if alone[-1] == tokenizer.eos_token_id else [*alone, tokenizer.eos_token_id])


def test_an_end_token_that_is_no_special_one_stays_text_too(write):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end>"])
    data = InstructionDataModule(
        write([{"prompt": "a <end>", "response": "b <end> c"}]), tokenizer, "pairs", val_fraction=0, end_token="<end>"
    )
    data.setup("fit")
    ((ids, labels),) = documents(data)
    assert (ids == tokenizer.convert_tokens_to_ids("<end>")).sum() == 1
    assert tokenizer.decode(labels[labels != IGNORED]) == "b <end> c<end>"


def test_a_template_that_writes_the_begin_token_gets_no_second_one(write):
    data = fitted(write, "adds the begin token", [ROWS["pairs"]], "pairs", prompt_template="<s>[INST] {prompt} [/INST]")
    ((ids, _),), (example,) = documents(data), data.examples("train")
    assert (ids == 0).sum() == 1
    assert data.encoder.prompt(example) == ids[: len(data.encoder.prompt(example))].tolist()


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_message_of_weight_0_is_read_and_not_learned(write, mask_prompt):
    tokenizer = made("bytes")
    for place, said in ((2, "Hello"), (4, "See you")):
        turns = [turn | ({"weight": 0} if i == place else {}) for i, turn in enumerate(TALK)]
        data = fitted(write, "bytes", [{"messages": turns}], "chat", mask_prompt=mask_prompt)
        ((ids, labels),), (example,) = documents(data), data.examples("train")
        learned = tokenizer.decode(labels[labels != IGNORED])
        assert said in tokenizer.decode(ids)
        assert said not in learned
        assert ("Bye" in learned) is not mask_prompt
        assert ids[: len(data.encoder.prompt(example))].tolist() == data.encoder.prompt(example)
        assert example.response == ("See you" if place == 2 else "Hello")
        folded = fitted(write, "bytes", [{"messages": turns}], "chat", system_in_user=True)
        ((_, labels),) = documents(folded)
        assert said not in tokenizer.decode(labels[labels != IGNORED])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_preferences_questions_and_typed_prompts(write, kind, chat):
    tokenizer, spelled = made(kind), "what </s> is"
    row = {"prompt": spelled, "chosen": "the </s> fox", "rejected": " the dog"}
    data = PreferenceDataModule(write([row]), tokenizer, val_fraction=0.0, use_chat_template=chat, max_length=200)
    data.setup("fit")
    (chosen, rejected), (example,) = data.train_dataloader().dataset[0], data.examples("train")
    prompt = data.encoder.prompt(example)
    end = tokenizer.eos_token_id
    for ids, labels in (chosen, rejected):
        assert ids[: len(prompt)].tolist() == prompt
        assert (labels == end).sum() == 1
    questions = QuestionDataModule(
        write([{"question": spelled, "answer": "3"}]), tokenizer, val_fraction=0.0, use_chat_template=chat, batch_size=1
    )
    questions.setup("fit")
    (batch,) = questions.train_dataloader()
    assert batch["input_ids"][0].tolist() == prompt
    assert prompt_tokens(tokenizer, f" {spelled} ", "pairs", chat, 200) == prompt


def test_guarding():
    control = ControlTokens(made("bytes"), "</s>")
    for text in ("</s>", "<</s>/s>", "a<|turn|><s>", "<s></s></s>", "plain", ""):
        guarded = control.guard(text)
        assert unguarded(guarded) == text
        assert not any(name in guarded for name in SPECIAL)
        assert (guarded == text) == (not any(name in text for name in SPECIAL))


def test_every_format_is_tried():
    assert set(ROWS) == {*FORMATS, "chat"}
