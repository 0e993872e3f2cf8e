"""Continue a prompt with the help of a draft, by transformers' assisted generation, and count the passes it takes.

A draft proposes K tokens, one after the other; the target reads them all in one pass, accepts the first few and adds
one of its own (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from language.generate import Finite, check_temperature, plain_settings
from language.models import context_length, vocabulary_size
from lit_adapters.errors import AdapterError
from lit_adapters.model.modes import evaluating
from lit_adapters.values import check_whole


@dataclass(frozen=True)
class DecodingSettings:
    """How to decode.

    Args:
        max_new_tokens: Most tokens of a continuation.
        draft_tokens: K, tokens that the draft proposes for each pass of the target; fewer where the end is nearer.
        temperatures: 0 takes the likeliest token each time; else tokens are drawn from softmax(logits / temperature).
        seed: Seeds the draws; each prompt has its own seed.

    Raises:
        AdapterError: A value is out of range.
    """

    max_new_tokens: int = 64
    draft_tokens: int = 5
    temperatures: tuple[float, ...] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens)
        check_whole("draft_tokens", self.draft_tokens)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        if not self.temperatures:
            raise AdapterError("temperatures is empty: give at least one, such as 0")
        for temperature in self.temperatures:
            check_temperature(temperature)


@dataclass(frozen=True)
class Continuation:
    """One continued prompt.

    Attributes:
        tokens: The new tokens.
        passes: Forward passes of the target, with the one that reads the prompt.
        proposed: Tokens of the draft that the target has looked at.
        seconds: Wall-clock time.
    """

    tokens: list[int]
    passes: int
    proposed: int
    seconds: float

    @property
    def accepted(self) -> int:
        """Tokens that the draft supplied: all but one a pass. An end token counts as the target's own."""
        return len(self.tokens) - self.passes


@torch.no_grad()
def continued(
    target: Any,
    prompt: Sequence[int],
    settings: DecodingSettings,
    temperature: float = 0.0,
    draft: Any = None,
    seed: int | None = None,
    end: int | None = None,
) -> Continuation:
    """Continue a prompt up to the target's end token, by the target alone or with a draft.

    Args:
        target: A causal language model of transformers.
        prompt: Token ids, at least one.
        settings: Lengths and seed.
        temperature: See `DecodingSettings`.
        draft: Another such model with the same tokenizer, with or without adapters; None for the target alone.
        seed: Seeds the draws at a temperature above 0; `settings.seed` by default.
        end: The end token of models whose generation settings have none: their tokenizer's.

    Raises:
        AdapterError: The target chooses a token that the draft does not have, prompt and continuation do not fit into a
            context, the target's output is not a number, or transformers has no speculative decoding for one of the
            models (Mamba, RWKV).
    """
    for model in (target,) if draft is None else (target, draft):
        _check(model, len(prompt) + settings.max_new_tokens, len(prompt))
    ids = torch.tensor([list(prompt)], device=target.device)
    widths: list[int] = []
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drawing = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    assistant = {} if draft is None else {"assistant_model": draft}
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        stack.enter_context(evaluating(target))
        stack.enter_context(plain_settings(target, end))
        if draft is not None:
            stack.enter_context(evaluating(draft))
            stack.enter_context(plain_settings(draft, end))
            stack.enter_context(_proposing(draft, settings.draft_tokens))
            stack.enter_context(_common_vocabulary(target, draft))
        stack.enter_context(torch.random.fork_rng([target.device] if target.device.type == "cuda" else []))
        torch.manual_seed(settings.seed if seed is None else seed)
        start = time.perf_counter()
        try:
            tokens = target.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=0,  # a single row has no padding
                logits_processor=[Finite(target)],
                do_sample=temperature > 0,
                use_cache=True,
                **drawing,
                **assistant,
            )
        except (AttributeError, ValueError) as error:  # how transformers refuses models without a cache of tokens
            raise AdapterError(
                f"{type(target).__name__} cannot decode with the draft {type(draft).__name__}: {error}. Choose models "
                "that keep keys and values of earlier tokens"
                if draft is not None
                else f"{type(target).__name__} cannot generate: {error}"
            ) from error
        new = tokens[0, len(prompt) :].tolist()
        seconds = time.perf_counter() - start
    # Every pass reads one token whose keys are not cached yet, the first one the prompt, and what is proposed.
    return Continuation(new, len(widths), sum(widths) - len(prompt) - (len(widths) - 1), seconds)


@contextlib.contextmanager
def _common_vocabulary(target: Any, draft: Any) -> Iterator[None]:
    """Inside the block, both models have logits for the same tokens: rows that pad the embeddings of one are left out.

    Raises:
        AdapterError: Inside the block: the target's likeliest token is none that the draft has.
    """
    common = min(vocabulary_size(target), vocabulary_size(draft))
    larger = [model for model in (target, draft) if vocabulary_size(model) > common]

    def cut(model: Any, args: Any, output: Any) -> Any:
        if model is target and (output.logits.argmax(-1) >= common).any():
            raise AdapterError(
                f"the target chooses a token beyond the {common} of the draft: choose a draft whose tokenizer is the "
                "target's"
            )
        output.logits = output.logits[..., :common]
        return output

    sizes = [(model.config.get_text_config(), model.config.get_text_config().vocab_size) for model in larger]
    handles = [model.register_forward_hook(cut) for model in larger]
    for config, _ in sizes:  # transformers compares them
        config.vocab_size = common
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, size in sizes:
            config.vocab_size = size


def _check(model: Any, length: int, prompt: int) -> None:
    if not prompt:
        raise AdapterError("a prompt has no tokens; give at least one")
    context = context_length(model)
    if context is not None and length > context:
        raise AdapterError(
            f"a prompt of {prompt} tokens and max_new_tokens {length - prompt} exceed the context of {context}: "
            "shorten the prompt or lower max_new_tokens"
        )


@contextlib.contextmanager
def _proposing(draft: Any, tokens: int) -> Iterator[None]:
    """Let the draft propose a constant number of tokens, however sure it is of them."""
    config = draft.generation_config
    wanted = {
        "num_assistant_tokens": tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    before = {name: getattr(config, name) for name in wanted}
    for name, value in wanted.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
