"""Multiple choice by log-likelihood: log p(choice | prompt) of each continuation, every prompt read once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from language.evaluate.prompts import TokenQuestion, common_prefix
from language.generate import cache_name
from language.measured import alike, documents, ignores_left_padding, left_padded, measured
from lit_adapters.errors import AdapterError
from lit_adapters.model.modes import evaluating
from lit_adapters.values import check_whole

_MIN_SHARED = 16  # tokens; a pass of its own for a shorter common prefix would cost more than it saves
_ROWS = 4  # most choices of a prompt in a pass, on average: each holds a copy of the prompt's cache


class Score(NamedTuple):
    """Score of a continuation.

    Attributes:
        log_likelihood: log p(continuation | context) in nats.
        greedy: Whether each of its tokens is the likeliest one in its place.
    """

    log_likelihood: float
    greedy: bool


def likeliest(scores: Sequence[Score]) -> int:
    """Index of the continuation with the highest log-likelihood, the first of equal ones."""
    return max(range(len(scores)), key=lambda i: scores[i].log_likelihood)


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, questions: Sequence[TokenQuestion], batch_size: int = 8, description: str = "scoring"
) -> list[list[Score]]:
    """Score of each continuation of each question.

    A context is read once and its key-value cache serves all its continuations; a beginning that the contexts of a
    batch have in common (examples of k-shot prompts) is read once for the batch. Continuations of a single token need
    no further pass. Models whose caches cannot be shared this way (sliding windows, recurrent states) read context and
    continuation together: the same numbers, slower.

    Args:
        model: A causal language model of transformers. Its training mode is left as it was.
        questions: Contexts with their continuations.
        batch_size: Contexts in a pass; continuations of several tokens are passes of up to 4 times as many rows.
        description: Text at the progress bar.

    Raises:
        AdapterError: The model's output is not a number, or `batch_size` is not at least 1.
    """
    check_whole("batch_size", batch_size)
    scores: list[list[Score]] = [[]] * len(questions)
    reader = _measured_reader(model)
    with evaluating(model), tqdm(total=len(questions), desc=description, leave=False) as bar:
        for batch in _batches(_grouped([q.context for q in questions]), batch_size):
            for index, row in zip(batch, _score(reader, [questions[i] for i in batch]), strict=True):
                if any(math.isnan(score.log_likelihood) for score in row):
                    raise AdapterError(f"the model's output for prompt {index} is not a number; its weights are broken")
                scores[index] = row
            bar.update(len(batch))
    return scores


def _grouped(contexts: list[list[int]]) -> list[int]:
    """An order in which contexts with much in common stand together, and contexts of similar length next."""
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    group = dict.fromkeys(order, 0)
    for number, (before, after) in enumerate(pairwise(order), 1):
        pair = [contexts[before], contexts[after]]
        if 2 * common_prefix(pair) > len(pair[1]):
            group[before] = group[before] or number
            group[after] = group[before]
    return sorted(order, key=lambda i: (group[i], -len(contexts[i])))


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    yield from (order[i : i + size] for i in range(0, len(order), size))


def _score(reader: _Reader, batch: list[TokenQuestion]) -> list[list[Score]]:
    contexts = [question.context for question in batch]
    pairs = [(row, tokens) for row, question in enumerate(batch) for tokens in question.continuations]
    longer = [(i, row, tokens) for i, (row, tokens) in enumerate(pairs) if len(tokens) > 1]
    shared = min(common_prefix(contexts), min(map(len, contexts)) - 1) if len(batch) > 1 else 0
    shared = shared if reader.can_share and shared >= _MIN_SHARED else 0
    reader.begin(cached=reader.can_share and bool(shared or longer))
    if shared:
        reader.feed([contexts[0][:shared]], keep=1)
        reader = reader.branch([0] * len(batch))
    first = reader.feed([context[shared:] for context in contexts], keep=1)[:, -1]
    begins = torch.tensor([tokens[0] for _, tokens in pairs], device=first.device)
    rows = torch.tensor([row for row, _ in pairs], device=first.device)
    sums = first[rows, begins].double()
    greedy = first.argmax(-1)[rows] == begins
    for start in range(0, len(longer), _ROWS * len(batch)):
        chunk = longer[start : start + _ROWS * len(batch)]
        keep = max(len(tokens) for _, _, tokens in chunk) - 1
        if reader.can_share:
            branch = reader.branch([row for _, row, _ in chunk])
            rest = branch.feed([tokens[:-1] for _, _, tokens in chunk], keep)
        else:
            reader.begin(cached=False)
            rest = reader.feed([contexts[row] + tokens[:-1] for _, row, tokens in chunk], keep)
        for (i, _, tokens), log_probabilities in zip(chunk, rest, strict=True):
            targets = torch.tensor(tokens[1:], device=rest.device)
            of_targets = log_probabilities[-len(targets) :]
            sums[i] += of_targets.gather(1, targets[:, None]).double().sum()
            greedy[i] &= (of_targets.argmax(-1) == targets).all()
    values = map(Score, sums.tolist(), greedy.tolist())
    return [[next(values) for _ in question.continuations] for question in batch]


class _Reader:
    """Feeds rows of tokens to a model, one pass after another, and keeps its cache and what of it is padding.

    Args:
        model: The model.
        pads_left: Whether the model ignores padding on the left.
        can_share: Whether its cache serves several rows that go on from one.
    """

    def __init__(self, model: PreTrainedModel, pads_left: bool = True, can_share: bool = True) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.cache_name = cache_name(model)
        self.pads_left = pads_left
        self.can_share = can_share

    def begin(self, cached: bool) -> None:
        """Forget what was read; keep a cache from now on if asked to."""
        self.cache = DynamicCache(config=self.model.config) if cached else None
        self.mask: Tensor | None = None

    def branch(self, rows: list[int]) -> _Reader:
        """A reader that goes on from these rows of what was read, in this order; rows may repeat."""
        index = torch.tensor(rows, device=self.device)
        assert self.cache is not None
        assert self.mask is not None
        other = copy(self)
        other.cache = copy(self.cache)
        other.cache.layers = [copy(layer) for layer in self.cache.layers]
        other.cache.batch_select_indices(index)
        other.mask = self.mask[index]
        return other

    def feed(self, rows: list[list[int]], keep: int) -> Tensor:
        """Log-probabilities (rows, keep, vocabulary) in fp32 after each of the last `keep` tokens of the rows."""
        if not self.pads_left:
            return self._feed_padded_right(rows, keep)
        length = max(map(len, rows))
        tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.device)
        real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        self.mask = real if self.mask is None else torch.cat([self.mask, real], dim=1)
        output = self.model(
            input_ids=tokens,
            use_cache=self.cache is not None,
            **left_padded(self.model, self.mask, length),
            **({self.cache_name: self.cache} if self.cache is not None else {}),
            **({"logits_to_keep": keep} if "logits_to_keep" in self.accepted else {}),
        )
        return output.logits[:, -keep:].float().log_softmax(-1)

    def _feed_padded_right(self, rows: list[list[int]], keep: int) -> Tensor:
        """As `feed`, without a cache: what comes after a token changes nothing before it in any causal model."""
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.device)
        real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        logits = self.model(input_ids=tokens, attention_mask=real, use_cache=False).logits
        ends = torch.tensor([[len(row)] for row in rows], device=self.device)
        places = (ends + torch.arange(-keep, 0, device=self.device)).clamp(min=0)
        kept = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
        return kept.float().log_softmax(-1)


def _measured_reader(model: PreTrainedModel) -> _Reader:
    pads_left = ignores_left_padding(model)
    return _Reader(model, pads_left, pads_left and measured(model, _shares_cache))


def _shares_cache(model: Any) -> bool:
    """Whether the cache of a row serves several rows that go on from it, with padding between their tokens."""
    layers = DynamicCache(config=model.config).layers
    # Only full attention with explicit positions ignores padding between tokens.
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not takes_positions or not all(type(layer) is DynamicLayer for layer in layers):
        return False
    start, one, other = (row[0].tolist() for row in documents(model, 4, 3, 1))
    reader = _Reader(model)
    reader.begin(cached=True)
    reader.feed([start], 1)
    reader = reader.branch([0, 0])
    reader.feed([one, other], 1)
    found = reader.feed([one[:1], other], 1)[:, -1]
    whole = [[*start, *one, one[0]], [*start, *other, *other]]
    alone = [model(input_ids=torch.tensor([row], device=reader.device), use_cache=False).logits[:, -1] for row in whole]
    return alike(found.to(alone[0].dtype), torch.cat(alone).float().log_softmax(-1))
