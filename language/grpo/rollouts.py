"""Groups of sampled completions, their log-probabilities, and their advantages within the group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from language.generate import continuations, plain_settings
from language.loss import IGNORED, Batch, learned_logits

_EPSILON = 1e-4  # beside the standard deviation of a group


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """One completion for each prompt, drawn from softmax(logits / temperature) and from nothing else.

    What the model's own generation settings would do to the distribution (top_k, penalties) is left out, as the
    log-probabilities of the training do not include it. A completion goes up to and including its end token, or to
    max_new_tokens: it has at least one token. It is a function of the weights, the arguments and the seed; the global
    random states are as before afterwards.

    Raises:
        AdapterError: Prompt and completion do not fit into the model's context.
    """
    device = model.device
    with (
        plain_settings(model, tokenizer.eos_token_id) as ends,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        tokens = continuations(model, tokenizer, prompts, max_new_tokens, temperature)
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).cumsum(1)
    kept = (ended.roll(1, 1).index_fill_(1, torch.tensor(0, device=tokens.device), 0)) == 0
    return [row[mask].tolist() for row, mask in zip(tokens, kept, strict=True)]


def joined(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts with their completions, {input_ids, attention_mask, labels} (N, T), padded on the right.

    Labels are those of the completions.
    """
    pairs = list(zip(prompts, completions, strict=True))
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
    labels = [torch.tensor([IGNORED] * len(prompt) + list(completion)) for prompt, completion in pairs]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def log_probabilities(forward: Callable[[Batch, Tensor], Tensor], batch: Batch, temperature: float) -> Tensor:
    """log p of each token of the completions, float32 (n,), row by row, with p = softmax(logits / temperature).

    Args:
        forward: Makes logits of a batch at some of its positions, as `language.loss.learned_logits` asks for.
        batch: As `joined` makes it.
        temperature: Temperature of sampling.
    """
    logits, learned = learned_logits(forward, batch)
    return -F.cross_entropy(logits / temperature, batch["labels"][learned], reduction="none")


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """A_i = (R_i - mean) / (std + 1e-4) over each group; exactly 0 where a group's rewards are equal.

    Equation in section 4.1.2 of arXiv 2402.03300. The standard deviation is that of a sample (divided by G - 1).

    Args:
        rewards: (N,), the members of a group side by side.
        group_size: G, at least 2, a divisor of N.
    """
    groups = rewards.view(-1, group_size)
    scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + _EPSILON)
    return scaled.masked_fill(constant(groups)[:, None], 0.0).flatten()  # a mean of equal values may be off by rounding


def constant(groups: Tensor) -> Tensor:
    """Which groups (groups, G) have equal rewards and teach nothing, bool (groups,)."""
    return groups.amax(1) == groups.amin(1)
