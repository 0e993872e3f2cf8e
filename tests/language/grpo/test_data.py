"""Questions: what is asked, which split has it, and in which order it comes."""

from __future__ import annotations

import pytest
import torch

import lit_adapters as la
from language.grpo.data import RepeatingSampler, arithmetic
from tests.language.grpo.rewarding import QUESTIONS, questions


def test_arithmetic_is_right_and_its_splits_share_nothing():
    rows = arithmetic(12)
    assert len(rows) == len({r.fields["prompt"] for r in rows}) == 13 * 13 + 13 * 14 // 2
    assert all(eval(r.fields["prompt"]) == int(r.answer) >= 0 for r in rows)
    data = questions(path="arithmetic:12", val_fraction=0.2, test_fraction=0.3)
    asked = [{e.prompt for e in data.examples(split)} for split in ("train", "val", "test")]
    assert sum(map(len, asked)) == len(rows) == len(set.union(*asked))
    assert [len(a) / len(rows) for a in asked] == pytest.approx([0.5, 0.2, 0.3], abs=0.01)


def test_batches():
    data = questions(prompt_template="Q: {prompt} {prompt}", batch_size=3, max_length=200)
    data.setup("fit")
    rows = next(iter(data.train_dataloader()))
    assert set(rows) == {"input_ids", "attention_mask", "answers"}
    examples = {e.prompt: e.response for e in data.examples("train")}
    for ids, mask, answer in zip(rows["input_ids"], rows["attention_mask"], rows["answers"], strict=True):
        text = data.tokenizer.decode(ids[mask.bool()])
        assert text.startswith("Q: ")
        assert examples[text] == answer
        assert not mask[int(mask.sum()) :].any()
    assert sum(len(b["answers"]) for b in data.val_dataloader()) == len(data.examples("val")) == 4


def test_columns_and_chat(write):
    path = write([{"problem": f"{i}?", "solution": f"#### {i}"} for i in range(8)])
    data = questions(path=path, columns={"question": "problem", "answer": "solution"}, use_chat_template=True)
    data.setup("fit")
    rows = next(iter(data.train_dataloader()))
    assert data.tokenizer.decode(rows["input_ids"][0][rows["attention_mask"][0].bool()]).startswith("<s>user\n")
    numbers = write([{"question": f"{i}?", "answer": i if i % 2 else i / 2} for i in range(8)], "numbers.jsonl")
    answers = {e.prompt.strip(): e.response for e in questions(path=numbers).examples("train")}
    assert answers.items() <= {f"{i}?": str(i) if i % 2 else str(i / 2) for i in range(8)}.items()
    with pytest.raises(la.DataError, match="field 'answer' must be text, got True;"):
        questions(path=write([{"question": "1?", "answer": True}], "flags.jsonl")).examples("train")
    with pytest.raises(la.DataError, match=r"columns names unknown fields \['prompt'\]"):
        questions(columns={"prompt": "problem"})
    with pytest.raises(la.DataError, match="field 'question' is missing"):
        questions(path=path).setup("fit")


@pytest.mark.parametrize("replicas", [1, 2])
def test_whole_batches_come_several_times(replicas):
    samplers = [RepeatingSampler(range(23), 3, 2, 0, replicas, rank) for rank in range(replicas)]
    seen = []
    for sampler in samplers:
        sampler.set_epoch(1)
        indices = [index for _, index in sampler]
        assert len(indices) == len(sampler) == 23 // (3 * replicas) * 6
        batches = torch.tensor(indices).view(-1, 2, 3)
        assert torch.equal(batches[:, 0], batches[:, 1])
        seen += batches[:, 0].flatten().tolist()
    assert len(seen) == len(set(seen)) == 23 // (3 * replicas) * 3 * replicas
    first = list(samplers[0])
    samplers[0].set_epoch(2)
    assert [i for _, i in samplers[0]] != [i for _, i in first]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "arithmetic:ten"}, "data arithmetic:ten: give the largest number, from 1 to 999"),
        ({"path": "arithmetic:0"}, "give the largest number"),
        ({"path": "nowhere.jsonl"}, r"nowhere\.jsonl does not exist"),
        ({"max_length": 10}, r"line 1: the prompt has \d+ tokens, over 10: raise max_length"),
        ({"batch_size": 100}, "12 training questions make no batch of 100"),
        ({"prompt_template": "Q: {question}"}, r"unknown fields \['question'\]: format pairs has prompt"),
    ],
)
def test_what_is_refused(changes, words):
    def first():
        data = questions(**{"path": QUESTIONS} | changes)
        data.setup("fit")
        return data.train_dataloader()

    with pytest.raises(la.DataError, match=words):
        first()
