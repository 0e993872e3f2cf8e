"""Measures that lm-evaluation-harness lacks: the loss of held-out rows, and what a generated text answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torchmetrics.functional.text.rouge import rouge_score
from tqdm import tqdm

from language.loss import Batch, token_losses
from lit_adapters.errors import AdapterError, DataError
from lit_adapters.model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Named, because torchmetrics' default includes rougeLsum, which fetches a sentence splitter.
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        value: The value.
        stderr: Its standard error; NaN where one observation cannot tell.
        n: Number of observations: questions, texts, or tokens for a loss.
    """

    value: float
    stderr: float
    n: int


def proportion(correct: Sequence[bool]) -> Estimate:
    """Share of true values with the binomial standard error sqrt(p (1 - p) / n)."""
    if not correct:
        raise DataError("no questions were asked: check the data and the limit")
    n = len(correct)
    p = sum(map(bool, correct)) / n
    return Estimate(p, math.sqrt(p * (1 - p) / n), n)


@dataclass(frozen=True)
class RowLosses:
    """Losses of held-out rows, one entry for each row with a learned token.

    Attributes:
        sums: Sum of -log p over the row's learned tokens, in nats.
        counts: Number of these tokens.
    """

    sums: list[float]
    counts: list[int]


@torch.no_grad()
def row_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> RowLosses:
    """-log p of held-out rows.

    Args:
        model: A causal language model of transformers. Its training mode is left as it was.
        batches: As `language.loss.token_losses` takes them.

    Raises:
        DataError: A batch has no learned token.
    """
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    with evaluating(model):
        for batch in tqdm(batches, desc="held-out loss", leave=False):
            losses, learned = token_losses(model, {name: value.to(device) for name, value in batch.items()})
            of_row = learned.sum(1).tolist()
            sums += [row.double().sum().item() for row in losses.split(of_row) if len(row)]
            counts += filter(None, of_row)
    return RowLosses(sums, counts)


def held_out_loss(rows: RowLosses) -> dict[str, Estimate]:
    """Mean negative log-likelihood in nats, and perplexity, over all learned tokens; every token counts the same.

    Returns:
        `loss` and `perplexity` = exp(loss). Standard errors take rows as drawn independently, tokens of a row not:
        sqrt(R / (R - 1) sum_r (s_r - loss n_r)^2) / n for R rows with sums s_r and counts n_r; perplexity's is
        perplexity times that.

    Raises:
        DataError: There is no learned token at all.
        AdapterError: The loss is not finite.
    """
    total, count = sum(rows.counts), len(rows.counts)
    if not total:
        raise DataError("no token of the held-out data has a label: check the format and the prompt mask")
    loss = sum(rows.sums) / total
    if not math.isfinite(loss):
        raise AdapterError(f"the held-out loss is {loss}; the model's weights are broken")
    squares = sum((s - loss * n) ** 2 for s, n in zip(rows.sums, rows.counts, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.nan
    perplexity = math.exp(min(loss, 700.0))
    return {"loss": Estimate(loss, error, total), "perplexity": Estimate(perplexity, perplexity * error, total)}


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F-measure of ROUGE-1, ROUGE-2 and ROUGE-L of a text, without stemming."""
    scores = rouge_score(prediction, reference, rouge_keys=ROUGE_KEYS)
    return {key: float(scores[f"{key}_fmeasure"]) for key in ROUGE_KEYS}


def normalised(text: str) -> str:
    """Lower case, single spaces, no quotes around the text, no mark at its end: what `exact_match` compares."""
    return " ".join(text.lower().split()).strip("\"'`").rstrip(".,;:!?").strip("\"'`")


def find_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that a generated text names first as a whole word; the longest of those; None without one."""
    found = []
    for index, option in enumerate(options):
        match = re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE)
        if match:
            found.append((match.start(), -len(option), index))
    return min(found)[2] if found else None
