"""Preferences as a Lightning data module: pairs of a chosen and a rejected answer to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from language.data.control import unguarded
from language.data.formats import Record
from language.data.module import InstructionDataModule
from language.data.packing import PaddedCollator, TokenDataset
from language.data.sources import SplitName, read_rows
from language.data.tokenise import Documents
from language.dpo.formats import DIALOGUE, Pair, read_pairs
from language.loss import Batch
from lit_adapters.errors import DataError

_CHUNK = 256  # pairs tokenised at a time
_LEAST = 8  # tokens in which a preference can be told


class PairCollator(PaddedCollator):
    """Batches as `PaddedCollator`, of rows of two documents: the first of every row, then the second of every row."""

    def __call__(self, rows: list[list[tuple[Tensor, Tensor]]]) -> Batch:
        return super().__call__([[row[side]] for side in (0, 1) for row in rows])


class PreferenceDataModule(InstructionDataModule):
    r"""Pairs of answers to one prompt, for preference tuning; the answers are learned, the prompts are not.

    Batches are `{input_ids, attention_mask, labels}`, each int64 (2 pairs, tokens): first the chosen answer of every
    pair after its prompt, then the rejected ones in the same order, all padded to the longest. Training batches hold
    pairs of similar length, by the longer answer. Answers end with the end token. A row is one of:

    - `prompt`, a text, and `chosen` and `rejected`, answers to it.
    - `prompt`, a dialogue: text of `\n\nHuman: ` and `\n\nAssistant: ` turns, or a list of messages with role and
      content; `chosen` and `rejected` are answers, or lists of one assistant's message.
    - `chosen` and `rejected`, whole dialogues that differ in their last message. The shared part is the prompt; a
      `prompt` of its own is ignored.

    Rows without a preference have equal answers, an empty prompt or answer, two different prompts, or no answer at the
    end: see `drop_unusable`. Badly formed rows (a missing field, a number for a text) are always errors.

    Where prompt and answers do not fit, the prompt keeps its last `max_length - max_answer_length` tokens, equally
    for both answers, and an answer loses its end; both are counted in one line. Pairs that are equal after that are
    dropped and counted, as nothing could be learned from them.

    Splits, subsets, orders and processes are those of `InstructionDataModule`.

    Args:
        path: A file (jsonl, json, csv, parquet), a folder with files named after splits, a `package://` address,
            `hub:NAME`, or a list of these.
        tokenizer: Name of a tokenizer as `language.models.create_tokenizer` takes it, or a tokenizer.
        max_length: Most tokens of a prompt and an answer.
        max_answer_length: Of those, tokens kept for an answer where the prompt is long; default half. A short prompt
            leaves more.
        batch_size: Pairs per batch and process; the model reads twice as many rows.
        use_chat_template: Write prompts and answers as messages, by the tokenizer's chat template. Otherwise a plain
            prompt stands as it is, with its answer in a new line, and a dialogue in `\n\nHuman: ` turns.
        drop_unusable: Drop rows without a preference, and count them by reason; otherwise they are errors that name
            file and line.
        settings: The others of `InstructionDataModule`.

    Raises:
        DataError: A setting is out of range, or data are missing, torn or badly formed; the message names the fix.
        AssetError: A package or tokenizer cannot be fetched.
    """

    def __init__(
        self,
        path: str | list[str],
        tokenizer: str | Any,
        max_length: int = 512,
        max_answer_length: int | None = None,
        batch_size: int = 4,
        use_chat_template: bool = False,
        drop_unusable: bool = False,
        **settings: Any,
    ) -> None:
        if max_length < _LEAST:
            raise DataError(f"max_length={max_length} must be at least {_LEAST}: a prompt and answers that differ")
        # Settings with a fixed value here are not options of this class.
        super().__init__(
            path,
            tokenizer,
            format="pairs",
            packing="buckets",
            columns=None,
            prompt_template=None,
            mask_prompt=True,
            drop_empty=False,
            cache_dir=None,
            on_disk=False,
            max_length=max_length,
            max_answer_length=max(1, max_length // 2) if max_answer_length is None else max_answer_length,
            batch_size=batch_size,
            use_chat_template=use_chat_template,
            **settings,
        )
        self.drop_unusable = drop_unusable

    def texts(self, pair: Pair) -> tuple[str, str, str]:
        """Prompt, chosen and rejected answer as the model reads them."""
        prompt, *answers = self._stretches(pair)
        chosen, rejected = map(unguarded, answers)
        return unguarded("".join(prompt)), chosen, rejected

    def adopt_base(self, meaning: dict[str, Any], origin: str) -> None:
        """Nothing: preferences have a frame of their own, whatever the base was trained on."""

    def meaning(self) -> dict[str, Any]:
        """As `InstructionDataModule.meaning`, with the frame of plain dialogues where most training pairs are such."""
        pairs = cast(list[Pair], self.records("train"))
        dialogues = sum(bool(pair.messages) for pair in pairs)
        frame = {"prompt_template": DIALOGUE} if not self.renderer.chat and 2 * dialogues > len(pairs) else {}
        return super().meaning() | frame

    def _stretches(self, pair: Pair) -> tuple[list[str], str, str]:
        """The stretches of the prompt, the chosen and the rejected answer; guarded, see `language.data.control`."""
        if self.renderer.chat:
            (*before, chosen), (*_, rejected) = (self.renderer.pieces(p) for p in (pair, pair.other))
            return [piece.text for piece in before], chosen.text, rejected.text
        control = self.renderer.control
        guarded = control.guarded(pair, answer=pair.answer, rejected=pair.rejected)
        if pair.messages:
            return [guarded.plain_prompt], f" {guarded.answer}", f" {guarded.rejected}"
        return [f"{guarded.plain_prompt}\n"], guarded.answer, guarded.rejected

    def _parse(self, path: str | list[str], split: SplitName) -> list[Record]:
        pairs, dropped = read_pairs(read_rows(path, split), self.drop_unusable, self.strip_answers)
        for reason, count in dropped.items():
            rank_zero_info(f"Data: {count} pairs of {path} dropped: {reason}.")
        return list(pairs)

    def _dataset(self, split: SplitName) -> TokenDataset:
        """Two documents for each pair: prompt with chosen, prompt with rejected answer."""
        pairs = cast(list[Pair], self.records(split))
        ids: list[Tensor] = []
        learned: list[Tensor] = []
        shortened = cut = equal = 0
        for prompt, *answers in tqdm(self._tokens(pairs), f"tokenising {split} pairs", len(pairs), delay=1.0):
            kept = prompt
            if len(prompt) + max(map(len, answers)) > self.max_length:
                kept = self._shortened(prompt)
            fitting = [answer[: self.max_length - len(kept)] for answer in answers]
            shortened += len(kept) < len(prompt)
            cut += fitting != answers
            if fitting[0] == fitting[1]:
                equal += 1
                continue
            for answer in fitting:
                ids.append(torch.tensor(kept + answer, dtype=torch.int32))
                learned.append(torch.arange(len(ids[-1])) >= len(kept))
        if shortened or cut:
            rank_zero_info(
                f"Data: of {len(pairs)} {split} pairs {shortened} lost the beginning of their prompt and {cut} the end "
                f"of an answer to max_length={self.max_length} tokens; {equal} dropped as nothing differs in the rest."
            )
        if not ids:
            raise DataError(f"the answers of all {len(pairs)} {split} pairs begin equally: raise max_length")
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        documents = Documents(torch.cat(ids), torch.cat(learned), offsets, equal, cut)
        return TokenDataset(documents, [[i, i + 1] for i in range(0, len(documents), 2)])

    def _shortened(self, prompt: list[int]) -> list[int]:
        """What a long prompt keeps: its beginning token, and its last ones."""
        room, begin = self.max_length - self.encoder.max_answer_length, self.encoder.begin
        return begin + prompt[max(len(begin), len(prompt) - room + len(begin)) :]

    def _tokens(self, pairs: Iterable[Pair]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Prompt, chosen and rejected answer, each tokenised by itself as in generation, answers with their end."""
        texts = [self._stretches(pair) for pair in pairs]
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            prompts = self.encoder.stretches.documents(prompt for prompt, _, _ in chunk)
            before = [prompt[-1] for prompt, *answers in chunk for _ in answers]
            answers = iter(self.encoder.stretches.after([a for _, *both in chunk for a in both], before))
            for stretches, chosen, rejected in zip(prompts, answers, answers, strict=True):
                prompt = self.encoder.begun([token for stretch in stretches for token in stretch])
                yield prompt, self._ended(chosen), self._ended(rejected)

    def _ended(self, answer: list[int]) -> list[int]:
        return answer if answer[-1:] == [self.encoder.end_id] else [*answer, self.encoder.end_id]

    def _collator(self) -> Callable[[list], Batch]:
        return PairCollator(self.pad_id)
