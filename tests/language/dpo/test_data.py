"""Preference data: what a row may be, what is refused or dropped, what is cut, and the batches."""

from __future__ import annotations

import json

import pytest
import torch

from language.data.sources import Row
from language.dpo.data import PreferenceDataModule
from language.dpo.formats import read_pairs
from language.loss import IGNORED
from language.models import create_tokenizer
from lit_adapters.errors import DataError
from tests.language.tiny import CONFIGS

HUMAN = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant:"
TURNS = [("user", "Hi."), ("assistant", "Hello."), ("user", "Who?")]
PLAIN = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def module(path, **changes):
    settings = {"tokenizer": "tiny_llama", "val_fraction": 0.0, "batch_size": 2, "max_length": 200}
    return PreferenceDataModule(path, **settings | changes)


def decoded(row):
    """Text of a row, and of what is learned of it."""
    tokenizer, (ids, labels) = create_tokenizer("tiny_llama"), row
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != IGNORED])


def first(path, **changes):
    data = module(path, **changes)
    data.setup("fit")
    return [decoded(side) for side in data.train_dataloader().dataset[0]]


# Rows

DIALOGUES = {
    "text prompt": {"prompt": HUMAN, "chosen": "Me.", "rejected": "You."},
    "text": {"chosen": f"{HUMAN} Me.", "rejected": f"{HUMAN} You."},
    "message prompt": {"prompt": messages(*TURNS), "chosen": "Me.", "rejected": "You."},
    "message prompt and answers": {
        "prompt": messages(*TURNS),
        "chosen": messages(("assistant", "Me.")),
        "rejected": messages(("assistant", "You.")),
    },
    "messages": {
        "prompt": "Who?",  # as some data sets repeat it
        "chosen": messages(*TURNS, ("assistant", "Me.")),
        "rejected": messages(*TURNS, ("assistant", "You.")),
    },
}


@pytest.mark.parametrize("form", DIALOGUES)
def test_dialogues_in_every_form_are_one(write, form):
    (pair,), dropped = read_pairs([Row(DIALOGUES[form], "row")])
    assert pair.messages == (*TURNS, ("assistant", "Me."))
    assert (pair.answer, pair.rejected) == ("Me.", "You.")
    assert pair.other.messages == (*TURNS, ("assistant", "You."))
    assert pair.other.other == pair
    assert not dropped
    path = write([DIALOGUES[form]])
    assert first(path) == [(f"{HUMAN} {said}</s>", f" {said}</s>") for said in ("Me.", "You.")]
    framed = "<s>user\nHi.</s>\n<s>assistant\nHello.</s>\n<s>user\nWho?</s>\n<s>assistant\n"
    assert first(path, use_chat_template=True) == [(f"{framed}{s}</s>", f"{s}</s>") for s in ("Me.", "You.")]


def test_plain_prompts(write):
    path = write([PLAIN])
    assert first(path) == [(f"Who?\n{said}</s>", f"{said}</s>") for said in ("Me.", "You.")]
    framed = "<s>user\nWho?</s>\n<s>assistant\n"
    assert first(path, use_chat_template=True) == [(f"{framed}{s}</s>", f"{s}</s>") for s in ("Me.", "You.")]


UNUSABLE = [
    (PLAIN | {"chosen": " You. "}, "chosen and rejected are equal"),
    (PLAIN | {"chosen": "  "}, "field 'chosen' has no answer"),
    (PLAIN | {"rejected": None}, "field 'rejected' has no answer"),
    (PLAIN | {"prompt": ""}, "field 'prompt' is empty"),
    (PLAIN | {"prompt": messages(("user", "a"), ("assistant", "b"))}, "the prompt ends with an assistant's message"),
    ({"chosen": f"{HUMAN} Me.", "rejected": f"{HUMAN} "}, "field 'rejected' has no answer"),
    ({"chosen": f"{HUMAN} Me.", "rejected": "\n\nHuman: What?\n\nAssistant: You."}, "have different prompts"),
    ({"chosen": f"{HUMAN} Me.\n\nHuman: And?", "rejected": f"{HUMAN} You."}, "does not end with an assistant's"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "the dialogues have no prompt"),
]


@pytest.mark.parametrize(("row", "words"), UNUSABLE)
def test_rows_without_a_preference(row, words):
    rows = [Row(PLAIN, "pairs.jsonl line 1"), Row(row, "pairs.jsonl line 2")]
    with pytest.raises(DataError, match=rf"^pairs\.jsonl line 2: .*{words}.*; correct the row, or set drop_unusable"):
        read_pairs(rows)
    pairs, dropped = read_pairs(rows, drop_unusable=True)
    assert len(pairs) == 1
    assert [words in reason for reason in dropped] == [True]
    with pytest.raises(DataError, match=r"none of 1 rows of pairs\.jsonl line 2 and after holds a preference"):
        read_pairs(rows[1:], drop_unusable=True)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, r"field 'rejected' is missing \(the row has prompt, chosen\)"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing, and chosen and rejected are no dialogues"),
        (PLAIN | {"chosen": 3}, "field 'chosen' must be text or a list of messages, got 3"),
        (PLAIN | {"chosen": f"{HUMAN} Me."}, "one of 'chosen' and 'rejected' is a whole dialogue"),
        (PLAIN | {"chosen": messages(("robot", "b"))}, "line 1, chosen, message 1: role 'robot' is unknown"),
        (PLAIN | {"chosen": ["b"]}, "expected a role"),
    ],
)
def test_badly_formed_rows_are_never_dropped(row, words):
    with pytest.raises(DataError, match=rf"^pairs\.jsonl line 1.*{words.removeprefix('line 1')}"):
        read_pairs([Row(row, "pairs.jsonl line 1")], drop_unusable=True)


def test_dropped_rows_are_counted(write, caplog):
    rows = [PLAIN, PLAIN | {"chosen": "You."}, PLAIN | {"rejected": ""}, PLAIN | {"rejected": ""}]
    with caplog.at_level("INFO"):
        module(write(rows), drop_unusable=True).setup("fit")
    assert "1 pairs of" in caplog.text
    assert "dropped: chosen and rejected are equal." in caplog.text
    assert "2 pairs of" in caplog.text


# Lengths


def test_a_long_prompt_loses_its_beginning_equally_for_both_answers(write, caplog):
    prompt = "".join(f"{i:02d}" for i in range(40))  # 80 bytes, and the line break
    path = write([{"prompt": prompt, "chosen": "good", "rejected": "x" * 50}])
    with caplog.at_level("INFO"):
        chosen, rejected = first(path, max_length=40, max_answer_length=10)
    kept = f"{prompt}\n"[-30:]
    assert chosen == (f"{kept}good</s>", "good</s>")
    assert rejected == (kept + "x" * 10, "x" * 10)
    assert "of 1 train pairs 1 lost the beginning of their prompt and 1 the end of an answer" in caplog.text


def test_a_short_prompt_leaves_its_room_to_the_answers(write):
    path = write([{"prompt": "p", "chosen": "a" * 50, "rejected": "b"}])
    chosen, _ = first(path, max_length=40, max_answer_length=10)
    assert chosen == ("p\n" + "a" * 38, "a" * 38)
    chosen, _ = first(path, max_length=53)
    assert chosen == ("p\n" + "a" * 50 + "</s>", "a" * 50 + "</s>")


def test_with_the_room_of_one_token(write):
    path = write([{"prompt": "prompt", "chosen": "abc", "rejected": "bcd"}])
    chosen, _ = first(path, max_length=8, max_answer_length=1)
    assert chosen == ("prompt\na", "a")
    with pytest.raises(DataError, match="max_length=4 must be at least 8"):
        first(path, max_length=4)


def test_pairs_that_are_equal_once_cut_are_dropped(write, caplog):
    alike = {"prompt": "p", "chosen": "a" * 30 + "b", "rejected": "a" * 30 + "c"}
    with caplog.at_level("INFO"):
        data = module(write([alike, PLAIN]), max_length=20)
        data.setup("fit")
    assert len(data.train_dataloader().dataset) == 1
    assert "1 dropped as nothing differs in the rest" in caplog.text
    with pytest.raises(DataError, match="the answers of all 1 train pairs begin equally: raise max_length"):
        module(write([alike]), max_length=20).setup("fit")


@pytest.mark.parametrize("changes", [{"max_length": 1}, {"max_answer_length": 200}, {"batch_size": 0}])
def test_settings_out_of_range(changes):
    with pytest.raises(DataError, match=f"{next(iter(changes))}="):
        module("nowhere", **changes)


# Batches and splits


def rows(number):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 100, (number, 2), generator=generator).tolist()
    return [{"prompt": f"{i:03d}", "chosen": "a" * m, "rejected": "b" * n} for i, (m, n) in enumerate(sizes)]


def test_batches_hold_chosen_answers_first(write):
    data = module(write(rows(5)))
    data.setup("fit")
    sizes = []
    for batch in data.train_dataloader():
        texts = [decoded(row) for row in zip(batch["input_ids"], batch["labels"], strict=True)]
        half = len(texts) // 2
        for (whole, chosen), (other, rejected) in zip(texts[:half], texts[half:], strict=True):
            assert set(chosen.removesuffix("</s>")) == {"a"}
            assert set(rejected.removesuffix("</s>")) == {"b"}
            assert whole[:4] == other[:4]
        assert torch.equal(batch["attention_mask"].sum(1) - 4, (batch["labels"] != IGNORED).sum(1))
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
        sizes.append(half)
    assert sorted(sizes) == [1, 2, 2]


def test_pairs_of_similar_length_share_a_batch(write):
    data = module(write(rows(64)), batch_size=8)
    data.setup("fit")
    of_pairs = [batch["attention_mask"].sum(1).view(2, -1).amax(0) for batch in data.train_dataloader()]
    in_order = torch.cat(of_pairs).sort().values.view(-1, 8)
    assert sorted(p.max().item() for p in of_pairs) == in_order.amax(1).tolist()
    assert sorted(p.min().item() for p in of_pairs) == in_order.amin(1).tolist()
    epochs = []
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        epochs.append([b["input_ids"] for b in loader])
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(*epochs, strict=True))


def test_workers_give_the_same_batches(write):
    path = write(rows(12))
    found = []
    for workers in (0, 2):
        data = module(path, num_workers=workers)
        data.setup("fit")
        found.append([batch["input_ids"] for batch in data.train_dataloader()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_equal_prompts_stay_in_one_split(write):
    given = [{"prompt": f"p{i % 5}", "chosen": f"good {i}", "rejected": "bad"} for i in range(30)]
    data = module(write(given), val_fraction=0.2, test_fraction=0.2)
    prompts = [{r.fields["prompt"] for r in data.records(split)} for split in ("train", "val", "test")]
    assert all(prompts)
    assert sum(map(len, prompts)) == 5


def test_the_rows_of_the_smoke_recipe_hold_every_kind():
    lines = (CONFIGS / "smoke/pairs.jsonl").read_text().splitlines()
    pairs, dropped = read_pairs([Row(json.loads(line), f"line {i}") for i, line in enumerate(lines, 1)])
    assert not dropped
    assert {bool(pair.messages) for pair in pairs} == {False, True}


def test_answers_keep_their_white_space_unless_asked(write):
    code = "\n    return x\n"
    rows = [
        PLAIN | {"chosen": code},
        {
            "prompt": messages(*TURNS[:-1], ("user", " Who? ")),
            "chosen": messages(("assistant", code)),
            "rejected": "You.",
        },
    ]
    for row in rows:
        (pair,), _ = read_pairs([Row(row, "row")])
        (stripped,), _ = read_pairs([Row(row, "row")], strip_answers=True)
        assert (pair.answer, stripped.answer) == (code, code.strip())
        assert pair.prompt_key == stripped.prompt_key
    dialogue = {"chosen": f"{HUMAN} {code}", "rejected": f"{HUMAN} You."}
    assert first(write([dialogue]))[0][1] == f" {code}</s>"


def test_answers_that_are_not_to_be_learned():
    row = PLAIN | {"chosen": [{"role": "assistant", "content": "Me.", "weight": 0}]}
    with pytest.raises(DataError, match="the answer in field 'chosen' is not to be learned"):
        read_pairs([Row(row, "row")])
    pairs, dropped = read_pairs([Row(PLAIN | {"weight": 0}, "row"), Row(PLAIN, "row")])
    assert len(pairs) == 1
    assert list(dropped) == ["the row says that it is not to be learned"]
