"""What the tests of the application share: a tokenizer of known words, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "What is the capital of France? The capital of France is Paris.",
    "Summarize this dialogue. Hannah needs the number of Betty, but Amanda does not have it.",
    "the quick brown fox jumps over the lazy dog, and then it sleeps",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<|turn|>", "<|done|>"]
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens, with an end token, a padding token and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT} | changes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path):
    """Write rows to a jsonl file: `write(rows, "train.jsonl")`; returns its path as text."""

    def jsonl(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return jsonl
