"""Questions with an answer that can be checked, as prompts for reinforcement learning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from language.data.formats import Record, check_columns
from language.data.module import InstructionDataModule
from language.data.rows import Row
from language.data.sources import SplitName
from lit_adapters.errors import DataError
from lit_adapters.lightning.resume.loader import ResumableLoader
from lit_adapters.lightning.resume.sampler import EpochSampler

ARITHMETIC = "arithmetic:"


def arithmetic(largest: int) -> list[Record]:
    """All sums a + b and all differences a - b >= 0 of whole numbers from 0 to `largest`, as questions "a + b"."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    answers = {f"{a} + {b}": a + b for a, b in pairs} | {f"{a} - {b}": a - b for a, b in pairs if a >= b}
    return [Record({"prompt": question}, str(answer), origin=question) for question, answer in answers.items()]


class QuestionDataModule(InstructionDataModule):
    """Questions as prompts in token ids, and the answers to them as text.

    Batches are `{input_ids, attention_mask, answers}`: int64 (prompts, tokens), padded on the right, and a list of
    texts. Splits and orders are as in `language.data.InstructionDataModule`: equal questions stay in one split.
    Training reads whole batches only, each `iterations` times in a row.

    Args:
        path: Rows with the fields question and answer, wherever `InstructionDataModule` finds rows; or `arithmetic:N`,
            all sums, and differences that are not negative, of whole numbers from 0 to N.
        tokenizer: Name of a tokenizer as `language.models.create_tokenizer` takes it, or a tokenizer.
        columns: The files' names of `question` and `answer` where they differ.
        max_length: Most tokens of a prompt; a longer one is an error.
        batch_size: Prompts per batch and process.
        prompt_template: Prompt with `{prompt}` in place of the question, instead of the question alone.
        use_chat_template: Write prompts as a user's message, by the tokenizer's chat template.
        iterations: Optimiser steps on the completions of each batch; that of the model.
        settings: The others of `InstructionDataModule`.

    Raises:
        DataError: A setting is out of range, or data are missing, torn or badly formed; the message names the fix.
        AssetError: A package or tokenizer cannot be fetched.
    """

    def __init__(
        self,
        path: str | list[str],
        tokenizer: str | Any,
        columns: dict[str, str] | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        prompt_template: str | None = None,
        use_chat_template: bool = False,
        iterations: int = 1,
        **settings: Any,
    ) -> None:
        names = {"question": "question", "answer": "answer"}
        check_columns(columns or {}, list(names), "a row of questions")
        names |= columns or {}
        # Settings with a fixed value here are not options of this class.
        super().__init__(
            path,
            tokenizer,
            format="pairs",
            packing="none",
            columns={"prompt": names["question"], "response": names["answer"]},
            max_answer_length=None,
            system_in_user=False,
            mask_prompt=True,
            end_token=None,
            drop_empty=False,
            strip_answers=True,
            cache_dir=None,
            on_disk=False,
            max_length=max_length,
            batch_size=batch_size,
            prompt_template=prompt_template,
            use_chat_template=use_chat_template,
            **settings,
        )
        self.iterations = iterations

    def adopt_base(self, meaning: dict[str, Any], origin: str) -> None:
        """Nothing: questions have a frame of their own, whatever the base was trained on."""

    def _parse(self, path: str | list[str], split: SplitName) -> list[Record]:
        if not isinstance(path, str) or not path.startswith(ARITHMETIC):
            return super()._parse(path, split)
        largest = path.removeprefix(ARITHMETIC)
        if not re.fullmatch(r"[1-9]\d{0,2}", largest):
            raise DataError(f"data {path}: give the largest number, from 1 to 999, as in {ARITHMETIC}99")
        return arithmetic(int(largest))

    def _parse_rows(self, rows: Iterable[Row], path: str | list[str]) -> Iterator[Record]:
        return super()._parse_rows((_answer_as_text(row, (self.columns or {})["response"]) for row in rows), path)

    def _dataset(self, split: SplitName) -> Any:
        records = self.records(split)
        prompts = [torch.tensor(self.encoder.prompt(self.renderer.example(record))) for record in records]
        return _Questions([(prompt, record.answer) for prompt, record in zip(prompts, records, strict=True)])

    def train_dataloader(self) -> DataLoader:
        """Training batches, in a new order each epoch."""
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        dataset = self._ready("train", "fit")
        sampler = RepeatingSampler(dataset, self.batch_size, self.iterations, self.order_seed, **replicas)
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Any, sampler: Sampler | None = None) -> DataLoader:
        return (DataLoader if sampler is None else ResumableLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_Collator(self.pad_id),
            pin_memory=torch.cuda.is_available(),
            # Its own generator: otherwise every new iterator draws from the global random state.
            generator=torch.Generator().manual_seed(self.order_seed),
        )


class RepeatingSampler(EpochSampler):
    """An `EpochSampler` of whole batches, each of which comes several times in a row.

    Args:
        dataset: The data set; only its length is used.
        batch_size: Samples per batch and process; the loader's must be the same.
        repeats: How often each batch comes.
        seed: Seeds the orders.
        num_replicas: Number of processes that share an epoch.
        rank: This process's place among them.

    Raises:
        DataError: There are fewer samples than one batch of all processes takes.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, repeats: int, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, seed, num_replicas, rank)
        self.group, self.repeats = batch_size * num_replicas, repeats
        batches = len(dataset) // self.group
        if not batches:
            raise DataError(
                f"{len(dataset)} training questions make no batch of {batch_size} in each of {num_replicas} processes: "
                "lower data.batch_size"
            )
        self.num_samples = batches * batch_size * repeats
        self.total_size = self.num_samples * num_replicas

    def order(self) -> Tensor:
        """All sample indices in the order of the present epoch, before replicas share them."""
        order = super().order()
        batches = order[: len(order) // self.group * self.group].view(-1, self.group)
        return batches.repeat_interleave(self.repeats, 0).flatten()


def _answer_as_text(row: Row, column: str) -> Row:
    """The row with its answer as text where it is a number."""
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return row
    return replace(row, values=row.values | {column: str(value)})


class _Questions(Dataset):
    """Prompts and answers; item i is (token ids (length,), answer)."""

    def __init__(self, rows: list[tuple[Tensor, str]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, str]:
        return self.rows[index[1] if isinstance(index, tuple) else index]


class _Collator:
    """Batches of `_Questions`."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[tuple[Tensor, str]]) -> dict[str, Any]:
        ids = [prompt for prompt, _ in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "answers": [answer for _, answer in rows],
        }
