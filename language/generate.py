"""Continue prompts token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from language.loss import IGNORED, Batch
from language.meaning import trained_end
from language.measured import alike, check_finite, documents, ignores_left_padding, measured
from language.models import context_length
from lit_adapters.errors import AdapterError, DataError
from lit_adapters.model.modes import evaluating
from lit_adapters.training.step_cost import CACHE, count_as, left_out, repeated
from lit_adapters.values import check_number, check_whole

_TRIED = 3  # tokens that are generated to find out whether rows stay apart
TEMPERATURES = (1e-6, 1e3)  # from the likeliest token to almost any


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: Any = None,
) -> list[str]:
    """Continue prompts up to the model's end token; one text for each, without the prompt. See `continuations`."""
    tokens = continuations(model, tokenizer, prompts, max_new_tokens, temperature, streamer)
    end = trained_end(model, tokenizer)
    rows = tokens.tolist() if end is None else [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    streamer: Any = None,
) -> Tensor:
    """The tokens that continue prompts, int64 (prompts, longest continuation); padding follows the end token.

    Keys and values of earlier tokens are kept, so every token costs one pass of one token. The model is in eval mode
    meanwhile; an adapter that forms a weight, as LoRAN does, then forms it once.

    Args:
        model: A transformers causal language model.
        tokenizer: The model's own.
        prompts: Token ids, at least one each; shorter rows are padded on the left. A model that reads the padding
            continues rows of one length at a time, one that mixes the rows of a batch (RWKV in transformers 5.24) each
            row by itself.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 takes the likeliest token each time; else tokens are drawn from softmax(logits / temperature).
        streamer: A transformers streamer that receives each token; for a single prompt.

    Raises:
        AdapterError: An argument is out of range, the model's output is not a number, or prompt and continuation do not
            fit into the model's context.
    """
    check_temperature(temperature)
    check_whole("max_new_tokens", max_new_tokens)
    if not all(prompts):
        raise AdapterError("a prompt has no tokens; give at least one")
    longest, context = max(map(len, prompts)), context_length(model)
    if context is not None and longest + max_new_tokens > context:
        raise AdapterError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the context of {context}: "
            "shorten the prompt or lower max_new_tokens"
        )
    pad: Any = tokenizer.pad_token_id
    together = _read_together(model, prompts)
    if len(together) > 1:
        groups = [[prompts[row] for row in rows] for rows in together]
        parts = [continuations(model, tokenizer, group, max_new_tokens, temperature) for group in groups]
        whole = torch.full((len(prompts), max(part.shape[1] for part in parts)), pad, device=model.device)
        for rows, part in zip(together, parts, strict=True):
            whole[rows, : part.shape[1]] = part
        return whole
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    drawing = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with evaluating(model), plain_settings(model, tokenizer.eos_token_id):
        tokens: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            logits_processor=[Finite(model)],
            do_sample=temperature > 0,
            use_cache=True,
            **drawing,
        )
    return tokens[:, longest:]


def _read_together(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the prompts, those together that the model may continue in one batch."""
    rows = list(range(len(prompts)))
    if len(rows) > 1 and not measured(model, _keeps_rows_apart):
        return [[row] for row in rows]
    lengths = sorted(set(map(len, prompts)))
    if len(lengths) == 1 or ignores_left_padding(model):
        return [rows]
    return [[row for row in rows if len(prompts[row]) == length] for length in lengths]


def _keeps_rows_apart(model: Any) -> bool:
    """Whether two rows that are generated together get the logits that each of them gets alone."""
    size = min(4, (context_length(model) or 8) - _TRIED)
    if size < 1:
        return True
    both = torch.cat(documents(model, size, size))
    forced = both[0, 0]

    def choose(_: Tensor, scores: Tensor) -> Tensor:  # the same token in every row
        return torch.full_like(scores, -torch.inf).index_fill(1, forced, 0.0)

    def logits(rows: Tensor) -> Tensor:
        with plain_settings(model):
            found = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=_TRIED,
                min_new_tokens=_TRIED,
                pad_token_id=0,
                logits_processor=[choose],
                do_sample=False,
                use_cache=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(found.logits, 1)

    together = logits(both)
    return all(alike(together[i : i + 1], logits(both[i : i + 1])) for i in (0, 1))


@torch.no_grad()
def made_up_completions(model: Any, rows: int, length: int, new: int) -> None:
    """Continue `rows` prompts of `length` made-up tokens by `new` tokens, with operations that can be traced.

    Raises:
        AdapterError: The model does not keep keys and values of all earlier tokens.
    """
    tokens = torch.zeros(rows, length + new, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    layers: list[Any] = cache.layers

    def read_on(begin: int, end: int) -> None:
        given = {"attention_mask": torch.ones_like(tokens[:, :end]), cache_name(model): cache}
        output = model(input_ids=tokens[:, begin:end], use_cache=True, logits_to_keep=1, **given)
        output.logits[:, -1].float().softmax(-1)

    def kept() -> list[Tensor]:
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def lengthen(layer: Any, count: int) -> None:
        keys, values = (t.new_zeros(rows, t.shape[1], count, t.shape[3]) for t in (layer.keys, layer.values))
        layer.update(keys, values)

    with evaluating(model):
        read_on(0, length)
        if cache.get_seq_length() != length or not all(isinstance(layer, DynamicLayer) for layer in layers):
            raise AdapterError(
                f"sampling from {type(model).__name__} cannot be estimated: it keeps more than keys and values"
            )
        count_as(CACHE, kept())
        for number in repeated(new - 1):
            begin = length + number
            if (missing := begin - cache.get_seq_length()) > 0:  # a trace leaves passes out
                with left_out():
                    for layer in layers:
                        lengthen(layer, missing)
            read_on(begin, begin + 1)
            count_as(CACHE, kept())


def cache_name(model: Any) -> str:
    """What the model calls the argument for keys and values of earlier tokens."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24


class Finite(LogitsProcessor):
    """Stops where logits are not numbers, from which no token can be drawn.

    Args:
        model: The model that generates, for the message.

    Raises:
        AdapterError: As `language.measured.check_finite`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits as they are."""
        check_finite(self.model, scores)
        return scores


def check_temperature(temperature: float) -> None:
    """Check that a temperature is 0 or one at which tokens can be drawn.

    Raises:
        AdapterError: It is not.
    """
    check_number("temperature", temperature, 0.0, TEMPERATURES[1])
    if temperature:
        check_number("temperature", temperature, *TEMPERATURES)


@contextmanager
def plain_settings(model: Any, end: int | None = None) -> Iterator[list[int]]:
    """Leave only the end tokens in the model's generation settings, and give these; `end` where the model has none.

    Other settings of a model, such as penalties and min_p, would change the likeliest token and the distribution
    softmax(logits / temperature) that tokens are drawn from.
    """
    own = model.generation_config
    ends = end if own.eos_token_id is None else own.eos_token_id
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config = GenerationConfig(eos_token_id=listed or None, pad_token_id=own.pad_token_id)
    try:
        yield listed
    finally:
        model.generation_config = own


def prompt_rows(batch: Batch) -> list[list[int]]:
    """The prompt of each row of a padded batch: its tokens before the first that is learned.

    Raises:
        DataError: The batch is packed, so that a row holds several documents.
    """
    if "attention_mask" not in batch:
        raise DataError("packed rows hold several prompts; set data.packing to none to predict")
    prompts = batch["attention_mask"].bool()
    if "labels" in batch:
        prompts &= (batch["labels"] != IGNORED).cumsum(1) == 0
    return [row[kept].tolist() for row, kept in zip(batch["input_ids"], prompts, strict=True)]
