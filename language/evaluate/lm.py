"""A model as lm-evaluation-harness asks it; a prompt is read once for all its choices."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from language.evaluate.likelihood import Score, score_tokens
from language.evaluate.prompts import Prompt, PromptEncoder, TokenQuestion
from language.generate import generate
from language.models import context_length
from lit_adapters.errors import DataError

Key = TypeVar("Key")


class SharedPromptLM(HFLM):
    """The harness's own model class for transformers, faster: the key-value cache of a prompt serves all its choices.

    Texts become tokens as the harness does it, so that its tasks give the numbers that `lm_eval --model hf` gives. But
    a prompt that is too long loses its beginning as training does it: it keeps its start-of-text token, and leaves room
    for the longest of its choices.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's own.
        batch_size: Prompts in a pass.
        max_length: Tokens that a pass may read; default the model's context.

    Attributes:
        truncated: Texts of the prompts that lost their beginning before choices were scored.

    Raises:
        DataError: Later, a choice has no tokens, or prompt and choice do not fit into `max_length`.
        AdapterError: Later, the model's output is not a number.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 8, max_length: int | None = None
    ) -> None:
        length = max_length or context_length(model)
        if tokenizer.pad_token is None:  # the harness would give it one
            tokenizer = deepcopy(tokenizer)
        with _unchanged(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
        self.encoder = PromptEncoder(tokenizer, length)
        self.truncated: set[str] = set()

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        """Log-likelihood, and whether it is the greedy answer, of each (texts, context, continuation)."""
        if any(texts is None for texts, _, _ in requests):  # stretches of one long text: there is nothing to share
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        places = _places(tuple(context) for _, context, _ in requests)
        questions = []
        for context, asked in places.items():
            continuations = [requests[i][2] for i in asked]
            for i, tokens in zip(asked, continuations, strict=True):
                if not tokens:
                    prompt, choice = requests[i][0]
                    raise DataError(f"choice {choice!r} after prompt ...{prompt[-60:]!r} has no tokens; give it a text")
            with self._noting(requests[asked[0]][0][0]):
                fitting = self.encoder.fit(list(context), max(map(len, continuations)))
            questions.append(TokenQuestion(fitting, continuations))
        return self._scores(places, questions)

    def _scores(self, places: Mapping[Any, list[int]], questions: Sequence[TokenQuestion]) -> list[Score]:
        """Scores of the continuations, in the order of the requests at `places`."""
        found = score_tokens(self.model, questions, self.batch_size, "log-likelihoods")
        by_place = {
            i: score
            for asked, scores in zip(places.values(), found, strict=True)
            for i, score in zip(asked, scores, strict=True)
        }
        return [by_place[i] for i in range(len(by_place))]

    @contextmanager
    def _noting(self, text: str) -> Iterator[None]:
        """Note the prompt if it is truncated."""
        before = self.encoder.truncated
        yield
        if self.encoder.truncated > before:
            self.truncated.add(text)


class TrainedPromptLM(SharedPromptLM):
    """The same, asked prompts in the tokens of the model's training.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's own.
        prompts: All prompts that will be asked.
        batch_size: Prompts in a pass.
        max_length: Tokens that a pass may read; default the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompts: Iterable[Prompt],
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, max_length)
        self.prompts = {prompt.text: prompt for prompt in prompts}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihood of each continuation, and whether it is the greedy answer."""
        places = _places(request.args[0] for request in requests)
        questions = []
        for text, asked in tqdm(places.items(), desc="tokens", leave=False, disable=disable_tqdm):
            with self._noting(text):
                choices = [requests[i].args[1] for i in asked]
                questions.append(self.encoder.question(self.prompts[text], choices))
        return self._scores(places, questions)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the end token that the model was trained with, at most `max_gen_toks` tokens each."""
        rows = []
        longest = max(request.args[1]["max_gen_toks"] for request in requests)
        for request in requests:
            with self._noting(request.args[0]):
                rows.append(self.encoder.prompt(self.prompts[request.args[0]], room=longest + 1))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        texts = [""] * len(rows)
        for start in tqdm(range(0, len(order), self.batch_size), desc="answers", leave=False, disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            answers = generate(self.model, self.tokenizer, [rows[i] for i in batch], max_new_tokens=longest)
            for index, answer in zip(batch, answers, strict=True):
                texts[index] = answer.strip()
        return texts


def _places(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Where each key stands in a sequence."""
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Keep the harness from tying the weights of a model again, and from warnings that all loaded models get."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    model.__dict__["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
        logger.setLevel(level)
