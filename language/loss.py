"""The next-token loss: which tokens of a batch are learned, and -log p of each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language.measured import check_packing
from language.models import context_length, vocabulary_size
from lit_adapters.errors import DataError

IGNORED = -100  # the label of a token that is not learned

Batch = Mapping[str, Tensor]


def read(model: nn.Module, batch: Batch, positions: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of a batch, or (B, P, V) at some of its positions.

    Args:
        model: A causal language model of transformers.
        batch: `input_ids` (B, T), and `attention_mask` or `position_ids` of the same shape.
        positions: Positions (P,), int64. The head, which is most of what a small model costs, is not applied at the
            others, unless the model offers no `logits_to_keep`.

    Raises:
        DataError: The model does not have a token id, or a sequence is longer than it was made for.
        AdapterError: The batch is packed, and documents of a row see each other in this model.
    """
    check_tokens(batch, vocabulary_size(model), context_length(model))
    if "position_ids" in batch and "attention_mask" not in batch and not torch.compiler.is_compiling():
        check_packing(model)
    ids, places, rows = batch["input_ids"], batch.get("position_ids"), 1
    fewer = positions is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = positions
    if places is not None and "attention_mask" not in batch and len(ids) > 1 and _is_flash_attention(model):
        # Flash attention tells packed documents apart in a single row only.
        rows, length = ids.shape
        ids, places = ids.reshape(1, -1), places.reshape(1, -1)
        if kept is not None:
            kept = (torch.arange(rows, device=kept.device)[:, None] * length + kept).flatten()
    options: dict[str, Any] = {"logits_to_keep": kept} if fewer else {}
    # Without a mask and without a cache transformers tells packed documents apart by their positions.
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=batch.get("attention_mask"),
        position_ids=places,
        use_cache=False,
        **options,
    ).logits
    if kept is not None and not fewer:
        logits = logits[:, kept]
    return logits if rows == 1 else logits.unflatten(1, (rows, -1))[0]


def _is_flash_attention(model: Any) -> bool:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    return "flash" in name


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """-log p of each learned token in nats, float32 (n,), row by row, and which tokens they are, bool (B, T).

    Labels stand at the places of their own tokens: labels[t] is predicted from input_ids[<t].

    Raises:
        DataError: No token is learned; or as `read`.
    """
    logits, learned = learned_logits(partial(read, model), batch)
    return F.cross_entropy(logits, batch["labels"][learned], reduction="none"), learned


def row_means(losses: Tensor, learned: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The mean loss of each row of the data that has a learned token, (rows,), in their order.

    Args:
        losses: The losses (n,) of `token_losses`.
        learned: Its learned tokens (B, T).
        position_ids: Those of a packed batch (B, T). Each of its documents is a row of the data.
    """
    begins = torch.zeros_like(learned) if position_ids is None else position_ids == 0
    begins[:, 0] = True
    row_of_token = begins.flatten().cumsum(0)[learned.flatten()]
    sizes = row_of_token.unique_consecutive(return_counts=True)[1].tolist()
    return torch.stack([row.mean() for row in losses.split(sizes)])


def learned_logits(forward: Callable[[Batch, Tensor], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits that predict the learned tokens, float32 (n, V), row by row, and which tokens these are, bool (B, T).

    Args:
        forward: Makes logits (B, P, V) of a batch and of positions (P,), as `read` does.
        batch: As `token_losses` takes it.

    Raises:
        DataError: No token is learned; or as `forward`.
    """
    learned = learned_tokens(batch)
    following = learned[:, 1:]
    if not following.any():
        raise DataError(
            f"all labels of a batch of {len(learned)} rows are masked, so there is nothing to learn: raise "
            "data.max_length or shorten the prompts"
        )
    positions = following.any(0).nonzero()[:, 0]
    # Only the logits of learned tokens are taken to float32.
    return forward(batch, positions)[following[:, positions]].float(), learned


def made_up_logits(
    forward: Callable[[Batch, Tensor], Tensor], rows: int, length: int, learned: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (rows * learned, V), float32, and learned tokens (rows * learned,) of a full batch of made-up tokens.

    All tokens are 0. The last `learned` of each row are learned; by default all. Unlike in `learned_logits`, the
    operations can be traced without values.
    """
    learned = length if learned is None else learned
    tokens = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    logits = forward(batch, torch.arange(length - learned, length)).flatten(0, 1)
    return logits[torch.arange(rows * learned)].float(), tokens[:, length - learned :].flatten()


def learned_tokens(batch: Batch) -> Tensor:
    """Which tokens (B, T) have a label and something before them to be predicted from."""
    learned = batch["labels"] != IGNORED
    learned[:, 0] = False
    if "position_ids" in batch:
        learned &= batch["position_ids"] != 0  # a document's first token does not follow from the one before it
    return learned


def check_tokens(batch: Batch, vocabulary: int, context: int | None) -> None:
    """Refuse tokens that a model cannot read.

    Args:
        batch: `input_ids` (B, T) and, if packed, `position_ids`.
        vocabulary: Number of token ids that the model has.
        context: Longest sequence that the model was made for; None for any.

    Raises:
        DataError: A token is out of range, or a sequence too long.
    """
    largest = int(batch["input_ids"].max())
    if largest >= vocabulary:
        raise DataError(
            f"token {largest} is outside the model's vocabulary of {vocabulary}: the data were tokenised for another "
            "model; give them the tokenizer of this one"
        )
    length = int(batch["position_ids"].max()) + 1 if "position_ids" in batch else batch["input_ids"].shape[1]
    if context is not None and length > context:
        raise DataError(
            f"a sequence of {length} tokens is longer than the model's {context} positions: lower data.max_length"
        )
