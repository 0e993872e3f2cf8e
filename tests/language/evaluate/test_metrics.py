"""Metrics against independent plain computations."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from language.evaluate.metrics import (
    Estimate,
    find_option,
    held_out_loss,
    normalised,
    proportion,
    rouge,
    row_losses,
)
from lit_adapters.errors import AdapterError, DataError


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.5, **sizes)).train()


def padded(rows: list[list[int]], prompt: int) -> dict[str, torch.Tensor]:
    """A right-padded batch whose first `prompt` tokens are not learned."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_held_out_loss(model):
    rows = [[1, 5, 7, 3], [2, 9, 9, 9, 9, 4, 8], [3, 3], [1, 2, 3, 4, 5]]
    batches = [padded(rows[:3], 2), padded(rows[3:], 1)]
    result = held_out_loss(row_losses(model, batches))
    assert model.training
    model.eval()
    losses = []
    for row, prompt in zip(rows, [2, 2, 2, 1], strict=True):
        log_probabilities = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        losses.append([-log_probabilities[t - 1, row[t]].item() for t in range(prompt, len(row))])
    tokens = [value for row in losses for value in row]
    mean = sum(tokens) / len(tokens)
    assert result["loss"].value == pytest.approx(mean, abs=1e-6)
    assert result["loss"].n == len(tokens) == 11
    assert result["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-6)
    # Three rows have labels; their sums are the independent observations.
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in losses)
    assert result["loss"].stderr == pytest.approx(math.sqrt(squares * 3 / 2) / 11, rel=1e-4)
    assert result["perplexity"].stderr == pytest.approx(math.exp(mean) * result["loss"].stderr)


def test_held_out_loss_of_packed_rows(model):
    """Documents side by side in one row give the loss they have alone."""
    one, two = [1, 5, 7, 3], [2, 9, 4]
    alone = held_out_loss(row_losses(model, [padded([one, two], 1)]))["loss"]
    labels = [-100, *one[1:], -100, *two[1:]]
    packed = {
        "input_ids": torch.tensor([one + two]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    }
    together = held_out_loss(row_losses(model, [packed]))["loss"]
    assert together.value == pytest.approx(alone.value, abs=1e-6)
    assert together.n == alone.n == 5
    assert math.isnan(together.stderr)


def test_held_out_loss_errors(model):
    with pytest.raises(DataError, match="no token of the held-out data has a label"):
        held_out_loss(row_losses(model, []))
    with pytest.raises(DataError, match="all labels of a batch of 1 rows are masked"):
        row_losses(model, [padded([[1, 2]], 2)])
    torch.nn.init.constant_(model.lm_head.weight, math.inf)
    with pytest.raises(AdapterError, match="held-out loss is nan"):
        held_out_loss(row_losses(model, [padded([[1, 2]], 1)]))


def f_measure(hits: int, predicted: int, reference: int) -> float:
    return 2 * hits / (predicted + reference)


def plain_rouge(prediction: str, reference: str) -> dict[str, float]:
    p, r = prediction.split(), reference.split()
    values = {}
    for n in (1, 2):
        grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (p, r)]
        values[f"rouge{n}"] = f_measure(sum((grams[0] & grams[1]).values()), len(p) - n + 1, len(r) - n + 1)
    longest = [[0] * (len(r) + 1) for _ in range(len(p) + 1)]
    for i, a in enumerate(p):
        for j, b in enumerate(r):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
    return values | {"rougeL": f_measure(longest[-1][-1], len(p), len(r))}


def test_rouge():
    predictions = ["the cat sat on the mat today", "amanda calls larry", "one two three"]
    references = ["the cat was on the mat", "hannah needs the number so she calls larry", "four five"]
    expected = [plain_rouge(p, r) for p, r in zip(predictions, references, strict=True)]
    for prediction, reference, values in zip(predictions, references, expected, strict=True):
        assert rouge(prediction, reference) == pytest.approx(values, abs=1e-6)
    assert rouge("Same Words", "same words!")["rougeL"] == 1


def test_proportion():
    assert proportion([True, True, False, False]) == Estimate(0.5, 0.25, 4)
    with pytest.raises(DataError, match="no questions"):
        proportion([])


def test_answers_in_generated_text():
    assert normalised(" 'Sci.Space.'\n") == normalised('Sci.Space".') == "sci.space"
    assert [normalised(text) for text in ("C++", "-1", "a  b!")] == ["c++", "-1", "a b"]
    options = ["sci.med", "sci", "answer1", "answer10"]
    assert find_option("I think Answer10, or sci", options) == 3
    assert find_option("it is sci.med", options) == 0
    assert find_option("science", options) is None
