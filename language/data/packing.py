"""From documents to batches: several in one row, or padded side by side, short ones with short ones.

Sampler and packing are our own, not those of transformers or trl: an epoch's order must be a pure function of its seed,
so that a run resumes bit for bit from the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from language.data.tokenise import Documents
from language.loss import IGNORED, Batch
from lit_adapters.lightning.resume.sampler import EpochSampler, permutation

BUCKET_BATCHES = 50  # batches that are sorted by length together
_CHUNK = 1 << 16  # documents whose lengths are looked at together


class Rows(Sequence[list[int]]):
    """Document indices of each row, in two tensors: lists of millions of rows would fill the memory.

    Args:
        documents: Document indices, row after row, shape (documents,).
        sizes: Documents of each row, shape (rows,).
    """

    def __init__(self, documents: Tensor, sizes: Tensor) -> None:
        self.documents = documents
        self.ends = sizes.cumsum(0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        return self.documents[start : int(self.ends[index])].tolist()


def pack(lengths: Tensor, max_length: int, *key: int | str) -> Rows:
    """Put documents into rows of at most `max_length` tokens, none of them split.

    Documents come in the order that belongs to the key, and each goes into the fullest row that still has room.

    Args:
        lengths: Tokens of each document, none above `max_length`, shape (documents,).
        max_length: Tokens of a row.
        key: Seeds the order.

    Returns:
        Document indices of each row.
    """
    order = permutation(len(lengths), "pack", *key)
    row_of = torch.empty_like(order)  # the row of each document of the order
    rows = 0
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by the tokens that are left: heaps
    rooms = 0  # bit i is set where a row has i tokens left
    for start in range(0, len(order), _CHUNK):
        chunk = lengths[order[start : start + _CHUNK]].tolist()
        for number, length in enumerate(chunk, start):
            if fitting := rooms >> length:
                left = length + (fitting & -fitting).bit_length() - 1
                row = heappop(open_rows[left])
                if not open_rows[left]:
                    rooms ^= 1 << left
            else:
                left, row = max_length, rows
                rows += 1
            row_of[number] = row
            if left > length:
                heappush(open_rows[left - length], row)
                rooms |= 1 << (left - length)
    return Rows(order[row_of.argsort(stable=True)], row_of.bincount())


class TokenDataset(Dataset):
    """Rows of one or more documents: item i is the list of (input_ids, labels) of the documents of row i.

    Args:
        documents: The documents.
        rows: Document indices of each row; by default each document is a row.
    """

    def __init__(self, documents: Documents, rows: Sequence[list[int]] | None = None) -> None:
        self.documents = documents
        self.rows = rows

    def __len__(self) -> int:
        return len(self.documents if self.rows is None else self.rows)

    @property
    def lengths(self) -> Tensor:
        """Tokens of the longest document of each row, int64, shape (rows,)."""
        if self.rows is None:
            return self.documents.lengths
        lengths = self.documents.lengths.tolist()
        return torch.tensor([max(lengths[i] for i in row) for row in self.rows])

    def __getitem__(self, index: int | tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """The row at `index`, or at an (epoch, index) pair of `EpochSampler`."""
        row = index[1] if isinstance(index, tuple) else index
        return [self.documents[i] for i in ([row] if self.rows is None else self.rows[row])]


class PackedCollator:
    """Batches `{input_ids, labels, position_ids}`, each int64 (rows, longest row).

    Documents of a row stand end to end, each with positions from 0. With such positions, no attention mask and no cache
    (`use_cache=False`), many models of transformers let a token attend to its own document only; an attention mask,
    even of ones, would let documents see each other. `language.measured.check_packing` refuses models that do not keep
    them apart. The first label of a document is -100, so that no loss crosses documents.
    Padding is one more document without labels.

    Args:
        pad_id: Token id of the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[list[tuple[Tensor, Tensor]]]) -> Batch:
        ids = [torch.cat([ids for ids, _ in row]) for row in rows]
        labels = [torch.cat([labels for _, labels in row]) for row in rows]
        longest = max(map(len, ids))
        positions = []
        for row, joined in zip(rows, ids, strict=True):
            lengths = [len(ids) for ids, _ in row] + [longest - len(joined)]
            positions.append(torch.cat([torch.arange(length) for length in lengths]))
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "position_ids": torch.stack(positions),
        }


class PaddedCollator:
    """Batches `{input_ids, attention_mask, labels}`, each int64 (documents, longest document), padded on the right.

    Args:
        pad_id: Token id of the padding; its labels are -100 and its mask 0.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[list[tuple[Tensor, Tensor]]]) -> Batch:
        ids = [ids for ((ids, _),) in rows]
        labels = [labels for ((_, labels),) in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


class BucketSampler(EpochSampler):
    """An `EpochSampler` whose batches hold documents of similar length, in random order.

    The epoch's order is divided into stretches of `BUCKET_BATCHES` batches. Each stretch is sorted by length and cut
    into batches; then all batches are shuffled. The last, smaller batch holds random documents.

    Args:
        lengths: Length of each sample.
        batch_size: Samples per batch and process; the loader's must be the same.
        seed: Seeds the orders.
        num_replicas: Number of processes that share an epoch.
        rank: This process's place among them.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(lengths, seed, num_replicas, rank)
        self.lengths = lengths
        self.group = batch_size * num_replicas

    def order(self) -> Tensor:
        """All sample indices in the order of the present epoch, before replicas share them."""
        order = super().order()
        whole = len(order) // self.group * self.group
        stretches = order[:whole].split(self.group * BUCKET_BATCHES)
        ordered = [stretch[self.lengths[stretch].argsort(stable=True)] for stretch in stretches]
        batches = torch.cat([*ordered, order[:0]]).view(-1, self.group)
        shuffled = batches[permutation(len(batches), "buckets", self.seed, self.epoch)]
        return torch.cat([shuffled.flatten(), order[whole:]])
