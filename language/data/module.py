"""Instruction data in any of the usual formats as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler

from language.data.formats import FORMATS, FormatName, Parser, Record, check_template
from language.data.packing import BucketSampler, PackedCollator, PaddedCollator, TokenDataset, pack
from language.data.rows import Row
from language.data.settings import check_settings
from language.data.sources import SplitName, each_row, fingerprint, has_split, read_rows
from language.data.splits import hold_out, subset
from language.data.templates import Example, Renderer
from language.data.token_files import tokenise, tokenise_on_disk
from language.data.tokenise import Documents, Encoder
from language.loss import Batch
from language.meaning import check_meaning
from language.models import create_tokenizer
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import check_same
from lit_adapters.lightning.resume.loader import ResumableLoader
from lit_adapters.lightning.resume.sampler import EpochSampler

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_STAGES: dict[str | None, tuple[SplitName, ...]] = {None: SPLITS, "fit": SPLITS[:2], "validate": ("val",)}


class InstructionDataModule(lightning.LightningDataModule):
    """Prompts and answers for a causal language model, as token ids and labels; tokens with label -100 are not learned.

    Batches are `{input_ids, attention_mask, labels}`, or with packing=packed `{input_ids, labels, position_ids}`
    and no mask (see `language.data.packing.PackedCollator`); each int64 (rows, tokens). Answers end with the end token,
    which is learned. Documents over `max_length` are cut as `language.data.tokenise.Encoder` says, and counted in one
    line. Splits are pure functions of the rows and the seed; equal prompts stay in one split. The order of an epoch is
    a pure function of (order_seed, epoch): equal for any `num_workers` and unaffected by the global random state.
    Under distributed training each process takes its share of the same order.

    Args:
        path: A file (jsonl, json, csv, tsv, parquet, or YAML with `conversations`; text also as .gz), a folder, a
            `package://` address, `hub:NAME` (or `hub:NAME?config=...&split=...&revision=...`), or a list of these.
            Files of a folder belong to the split whose exact name they have (train.jsonl,
            val-00000-of-00001.parquet); other files are counted and named.
        tokenizer: Name of a tokenizer as `language.models.create_tokenizer` takes it, or a tokenizer.
        format: Fields of a row. alpaca: instruction, input, output. openorca: system_prompt, question, response. chat:
            messages, each with role and content (text, or a list of parts of text), or ShareGPT's conversations; an
            answer with `weight: 0`, `train: false` or `mask: true` is not learned; tools, and calls of them, are
            written by the chat template. summarisation: dialogue, summary. classification: text, label. pairs: prompt,
            response.
        val_path: Validation data; without it path's own validation files, or val_fraction of the training rows.
        test_path: Test data; without it path's own test files, or test_fraction of the training rows.
        columns: The files' names of fields where they differ, such as `{label: label_name}`.
        max_length: Most tokens of a document, and of a row of packed documents.
        max_answer_length: Of those, tokens kept for the answer in formats summarisation and classification, whose long
            texts lose their beginning; default a quarter.
        batch_size: Rows per batch and process.
        packing: `none` pads documents side by side; `buckets` does so with documents of similar length; `packed` puts
            as many documents into a row as fit, for models that keep them apart (`language.measured.check_packing`).
        val_fraction: Share of the training rows to hold out for validation where there is no validation data.
        test_fraction: Share of the training rows to hold out for testing where there is no test data.
        train_subset: Number of training rows to use, chosen at random; default all.
        val_subset: Number of validation rows to use; default all.
        test_subset: Number of test rows to use; default all.
        prompt_template: Prompt with the format's fields in braces, instead of its own.
        use_chat_template: Write rows of any format as messages, by the tokenizer's chat template; format chat always
            does.
        chat_template: Jinja text instead of the tokenizer's own chat template.
        system_in_user: Put system messages before the first user message, for chat templates without them.
        mask_prompt: Learn answers only; otherwise prompts as well.
        end_token: Token that ends an answer; default the tokenizer's end token.
        drop_empty: Drop rows with an empty prompt or answer, and say how many; otherwise they are an error.
        strip_answers: Remove the white space that surrounds answers; otherwise it is learned. Prompts and classes
            always lose it.
        cache_dir: Folder that keeps tokenised data for the next run; by default they are not kept.
        on_disk: For training data larger than memory: read rows one at a time, and leave their tokens in `cache_dir`,
            from where batches are read. Batches are the same. No rows can be held out or chosen: set val_path, or
            val_fraction to 0.
        num_workers: Worker processes per loader; 0 loads in the training process.
        seed: Seeds splits, subsets and packing.
        order_seed: Seeds the order of epochs; default seed.
        subset_index: Which subset of train_subset rows to train on. Subsets with different indices have no row in
            common; the validation rows are the same for all.

    Raises:
        DataError: A setting is out of range, or data are missing, torn or badly formed; the message names the fix.
        AssetError: A package or tokenizer cannot be fetched.
    """

    def __init__(
        self,
        path: str | list[str],
        tokenizer: str | Any,
        format: FormatName = "alpaca",
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        columns: dict[str, str] | None = None,
        max_length: int = 512,
        max_answer_length: int | None = None,
        batch_size: int = 8,
        packing: Literal["none", "packed", "buckets"] = "none",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        train_subset: int | None = None,
        val_subset: int | None = None,
        test_subset: int | None = None,
        prompt_template: str | None = None,
        use_chat_template: bool = False,
        chat_template: str | None = None,
        system_in_user: bool = False,
        mask_prompt: bool = True,
        end_token: str | None = None,
        drop_empty: bool = False,
        strip_answers: bool = False,
        cache_dir: str | None = None,
        on_disk: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        order_seed: int | None = None,
        subset_index: int = 0,
    ) -> None:
        super().__init__()
        self.format: FormatName = format
        self.path = path
        self.paths = {"val": val_path, "test": test_path}
        self.columns = columns
        self.max_length = max_length
        self.max_answer_length = max_answer_length
        self.batch_size = batch_size
        self.packing = packing
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.subsets = {"train": train_subset, "val": val_subset, "test": test_subset}
        self.prompt_template = prompt_template
        self.use_chat_template = use_chat_template
        self.chat_template = chat_template
        self.system_in_user = system_in_user
        self.mask_prompt = mask_prompt
        self.end_token = end_token
        self.drop_empty = drop_empty
        self.strip_answers = strip_answers
        self.cache_dir = cache_dir
        self.on_disk = on_disk
        self.num_workers = num_workers
        self.seed = seed
        self.order_seed = seed if order_seed is None else order_seed
        self.subset_index = subset_index
        self._tokenizer = tokenizer
        check_settings(self)
        self._of_the_base: tuple[dict[str, Any], str] | None = None
        self._parsed: dict[str, list[Record]] = {}
        self._datasets: dict[str, TokenDataset] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return create_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer

    @cached_property
    def renderer(self) -> Renderer:
        """Writes the text of a row."""
        return Renderer(
            self.tokenizer,
            self._end[0],
            self.format,
            self.prompt_template,
            self.use_chat_template,
            self.chat_template,
            self.system_in_user,
        )

    @cached_property
    def encoder(self) -> Encoder:
        """Turns the text of a row into tokens."""
        return Encoder(
            self.tokenizer,
            self._end[1],
            self.max_length,
            self.mask_prompt,
            plain=not self.renderer.chat,
            max_answer_length=self.max_answer_length,
        )

    @cached_property
    def _end(self) -> tuple[str, int]:
        """Text and id of the token that ends an answer."""
        token = self.end_token or self.tokenizer.eos_token
        if token is None:
            raise DataError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no end token: name one of its tokens in end_token"
            )
        index = self.tokenizer.get_vocab().get(token)
        if index is None:
            raise DataError(f"end_token {token!r} is not a token of tokenizer {self.tokenizer.name_or_path!r}")
        return token, index

    @cached_property
    def pad_id(self) -> int:
        """Token id of padding, the end token's where the tokenizer has none."""
        own = self.tokenizer.pad_token_id
        if own is None or own == self._end[1]:
            rank_zero_info(f"Data: padding with the end token {self._end[0]!r}; its labels are masked there.")
        return self._end[1] if own is None else own

    @cached_property
    def classes(self) -> list[str]:
        """All labels of classification data, training rows and those held out of them, sorted."""
        if self.format != "classification":
            raise DataError(f"format={self.format} has no classes; only classification has")
        return sorted({record.answer for record in (self._each_record() if self.on_disk else self._training_rows)})

    def meaning(self) -> dict[str, Any]:
        """What a model that learns these data must be asked with: it travels with the weights."""
        found = {
            "format": self.format,
            "use_chat_template": self.renderer.chat,
            "system_in_user": self.system_in_user,
            "prompt_template": self.prompt_template,
            "chat_template": self.renderer.chat_template if self.renderer.chat else None,
            "end_token": self._end[0],
            "end_token_ids": [self._end[1]],
        }
        return found | ({"classes": self.classes} if self.format == "classification" else {})

    def adopt(self, meaning: dict[str, Any], origin: str) -> None:
        """Take from a trained model what the settings leave open: templates, end token, classes.

        Args:
            meaning: What the model was trained with, as `meaning` says it.
            origin: Where it was found, for messages.

        Raises:
            AdapterError: A setting contradicts it.
        """
        self._of_the_base = None
        check_meaning(meaning, origin)
        open_settings = ("prompt_template", "chat_template", "end_token")
        named = {name: getattr(self, name) for name in open_settings if getattr(self, name) is not None}
        flags = {"use_chat_template": self.renderer.chat, "system_in_user": self.system_in_user}
        check_same(meaning, {"format": self.format, **flags, **named}, origin)
        for name in open_settings:
            setattr(self, name, getattr(self, name) or meaning.get(name))
        if self.prompt_template is not None:
            check_template(self.prompt_template, FORMATS[self.format], self.format)
        before = (self.renderer.settings, self._end)
        for name in ("renderer", "encoder", "_end", "pad_id"):
            self.__dict__.pop(name, None)
        if meaning.get("classes"):
            self.__dict__["classes"] = list(meaning["classes"])
        if before != (self.renderer.settings, self._end):
            self._datasets = {split: self._dataset(split) for split in self._datasets}  # type: ignore[arg-type]

    def adopt_base(self, meaning: dict[str, Any], origin: str) -> None:
        """As `adopt`, when batches are first asked for, unless a checkpoint's meaning is adopted before.

        Args:
            meaning: What the base of the model was trained with.
            origin: Where it was found, for messages.
        """
        self._of_the_base = meaning, origin

    def examples(self, split: SplitName) -> list[Example]:
        """Prompts and answers of a split as text, for generation and scoring; needs no `setup`."""
        return [self.renderer.example(record) for record in self.records(split)]

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage uses: fit and validate never touch the test split."""
        for split in _STAGES.get(stage, ("test",)):
            optional = stage is None or (stage, split) == ("fit", "val")
            if split not in self._datasets and (self._has(split) or not optional):
                self._datasets[split] = self._dataset(split)

    def _has(self, split: SplitName) -> bool:
        return split == "train" or self._own(split) is not None or self._fraction(split) > 0

    def _dataset(self, split: SplitName) -> TokenDataset:
        documents = self._documents(split)
        if documents.dropped or documents.cut:
            rank_zero_info(
                f"Data: of {len(documents) + documents.dropped} {split} rows {documents.cut} were cut to "
                f"max_length={self.max_length} tokens and {documents.dropped} dropped because nothing to learn would "
                "have been left."
            )
        if self.packing != "packed":
            return TokenDataset(documents)
        rows = pack(documents.lengths, self.max_length, split, self.seed)
        full = len(documents.input_ids) / (len(rows) * self.max_length)
        rank_zero_info(f"Data: {len(documents)} {split} documents packed into {len(rows)} rows, {full:.0%} full.")
        return TokenDataset(documents, rows)

    def _documents(self, split: SplitName) -> Documents:
        """The tokens of a split."""
        description = f"tokenising {split} rows"
        cache = Path(self.cache_dir).expanduser() if self.cache_dir else None
        if split != "train" or not self.on_disk:
            return tokenise(self.records(split), self.renderer, self.encoder, description, cache)
        assert cache is not None
        for name in SPLITS[1:]:
            self._fraction(name)  # before anything is read
        origin = (fingerprint(self.path, "train"), self.format, self.columns, self.drop_empty, self.strip_answers)
        return tokenise_on_disk(self._each_record(), origin, self.renderer, self.encoder, description, cache)

    def _each_record(self) -> Iterator[Record]:
        """The training rows, read one at a time."""
        yield from self._parse_rows(each_row(self.path, "train"), self.path)

    def records(self, split: SplitName) -> list[Record]:
        """The rows of a split, without tokens; needs no `setup`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown: use train, val or test")
        if split not in self._parsed:
            records, size = self._split(split), self.subsets[split]
            if size is not None and size > len(records):
                raise DataError(f"{split}_subset={size}, but the {split} split has {len(records)} rows: lower it")
            index = self.subset_index if split == "train" else 0
            if size is not None and (index + 1) * size > len(records):
                raise DataError(
                    f"subset_index={index} is too large: the train split has {len(records)} rows, so that there are "
                    f"{len(records) // size} disjoint subsets of train_subset={size} rows: lower one of them"
                )
            self._parsed[split] = subset(records, size, "subset", split, self.seed, index=index)
        return self._parsed[split]

    def _split(self, split: SplitName) -> list[Record]:
        if split != "train":
            if (own := self._own(split)) is not None:
                return self._parse(own, split)
            if not self._fraction(split):
                raise DataError(f"there is no {split} data: set {split}_path, or {split}_fraction above 0")
        return hold_out(self._training_rows, {"test": self._fraction("test"), "val": self._fraction("val")}, self.seed)[
            split
        ]

    def _own(self, split: SplitName) -> str | list[str] | None:
        """Where a split has data of its own."""
        return self.paths[split] or (self.path if has_split(self.path, split) else None)

    def _fraction(self, split: SplitName) -> float:
        """Share of the training rows to hold out for a split: none where it has data of its own."""
        if self._own(split) is not None:
            return 0.0
        fraction = self.val_fraction if split == "val" else self.test_fraction
        if fraction and self.on_disk:
            raise DataError(
                f"{split}_fraction={fraction} would hold rows out, which on_disk cannot do: set {split}_path to a file "
                f"of its own, or {split}_fraction to 0"
            )
        return fraction

    @cached_property
    def _training_rows(self) -> list[Record]:
        return self._parse(self.path, "train")

    def _parse(self, path: str | list[str], split: SplitName) -> list[Record]:
        return list(self._parse_rows(read_rows(path, split), path))

    def _parse_rows(self, rows: Iterable[Row], path: str | list[str]) -> Iterator[Record]:
        parser = Parser(self.format, self.columns, self.drop_empty, self.strip_answers)
        yield from parser.records(rows)
        if parser.empty:
            rank_zero_info(f"Data: {parser.empty} empty rows of {path} dropped.")

    def train_dataloader(self) -> DataLoader:
        """Training batches, in a new order each epoch; the last one may be smaller."""
        # The sampler shares an epoch among processes itself, because Lightning's own wrapper would lose the epoch.
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        dataset = self._ready("train", "fit")
        if self.packing == "buckets":
            return self._loader(dataset, BucketSampler(dataset.lengths, self.batch_size, self.order_seed, **replicas))
        return self._loader(dataset, EpochSampler(dataset, self.order_seed, **replicas))

    def val_dataloader(self) -> DataLoader | list:
        """Validation batches, in a fixed order; none if there is no validation data."""
        return self._loader(self._ready("val", "validate")) if self._has("val") else []

    def test_dataloader(self) -> DataLoader:
        """Test batches, in a fixed order; `predict` continues their prompts, unless rows are packed."""
        return self._loader(self._ready("test", "test"))

    def predict_dataloader(self) -> DataLoader:
        """Batches whose prompts `predict` continues: those of tests.

        Raises:
            DataError: Prompts are learned, so that a row does not say where its prompt ends.
        """
        if not self.encoder.mask_prompt:
            raise DataError(
                "mask_prompt=false learns prompts too, so that a row does not say where its prompt ends: set "
                "data.mask_prompt to true to predict"
            )
        return self.test_dataloader()

    def _ready(self, split: str, stage: str) -> TokenDataset:
        if split not in self._datasets:
            raise DataError(f"setup({stage!r}) has not run: let the Trainer call it, or call it first")
        if self._of_the_base is not None:
            self.adopt(*self._of_the_base)
        return self._datasets[split]

    def _collator(self) -> Callable[[list], Batch]:
        return (PackedCollator if self.packing == "packed" else PaddedCollator)(self.pad_id)

    def _loader(self, dataset: TokenDataset, sampler: Sampler | None = None) -> DataLoader:
        return (DataLoader if sampler is None else ResumableLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self._collator(),
            pin_memory=torch.cuda.is_available(),
            # Its own generator: otherwise every new iterator draws from the global random state.
            generator=torch.Generator().manual_seed(self.order_seed),
        )
