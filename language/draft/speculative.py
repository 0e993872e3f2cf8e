"""Speculative decoding, measured: python -m language.draft.speculative --ckpt FILE --prompts FILE --out result.json

`measure` says what is measured; `language.draft.decoding` decodes.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from language.data.formats import FormatName
from language.data.sources import read_rows
from language.draft.decoding import Continuation, DecodingSettings, continued
from language.draft.module import DraftTuner, merged_draft
from language.evaluate.metrics import Estimate, proportion
from language.evaluate.results import table, versions, write_json
from language.models import context_length, default_device
from language.module import load_tuner
from language.prompt import prompt_tokens
from lit_adapters import console
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import meaning_of
from lit_adapters.lightning.cli import run
from lit_adapters.values import check_whole


def measure(
    target: Any, draft: Any, prompts: Sequence[Sequence[int]], settings: DecodingSettings, end: int | None = None
) -> dict[str, dict[str, Estimate]]:
    """Continue every prompt with and without the draft, in turns, at each temperature.

    Args:
        target: A causal language model of transformers.
        draft: Another one, of the same vocabulary; with or without adapters.
        prompts: Token ids.
        settings: How to decode.
        end: The end token of models whose generation settings have none: their tokenizer's.

    Returns:
        For each `temperature T`:

        - `accepted length`: new tokens for each pass of the target, with the target's own; from 1 to K + 1.
        - `acceptance`: share of the proposed tokens that were accepted. Tokens after a rejected one count as proposed,
          and an accepted end token counts as the target's own.
        - `identical` (temperature 0 only): share of prompts whose tokens are those of the target alone. In exact
          arithmetic all are. In floating point the target rounds differently when it reads several tokens at once, and
          near-ties may go the other way: hardly in float32, often in bfloat16.
        - `tokens/s`, `tokens/s alone`: new tokens a second with the draft and without, reading the prompt included.
        - `speedup`: median over prompts of the ratio of the two.

        Standard errors take prompts as drawn independently; those of speeds are not estimated.

    Raises:
        DataError: There are no prompts.
        AdapterError: As `continued`.
    """
    if not prompts:
        raise DataError("there are no prompts to continue: check the file and the limit")
    for helper in (None, draft):  # the first call of each kind is slower
        continued(target, prompts[0], settings, draft=helper, end=end)
    results = {}
    for temperature in settings.temperatures:
        alone: list[Continuation] = []
        assisted: list[Continuation] = []
        for index, prompt in enumerate(tqdm(prompts, desc=f"temperature {temperature:g}", delay=1.0)):
            turns = [(alone, None), (assisted, draft)]
            for found, helper in turns if index % 2 == 0 else turns[::-1]:
                found.append(continued(target, prompt, settings, temperature, helper, settings.seed + index, end))
        results[f"temperature {temperature:g}"] = _summary(alone, assisted, exact=temperature == 0)
    return results


def _summary(alone: list[Continuation], assisted: list[Continuation], exact: bool) -> dict[str, Estimate]:
    pairs = list(zip(alone, assisted, strict=True))
    speedups = [(len(b.tokens) / b.seconds) / (len(a.tokens) / a.seconds) for a, b in pairs]
    same = {"identical": proportion([a.tokens == b.tokens for a, b in pairs])} if exact else {}
    return {
        "accepted length": _ratio([len(c.tokens) for c in assisted], [c.passes for c in assisted]),
        "acceptance": _ratio([c.accepted for c in assisted], [c.proposed for c in assisted]),
        **same,
        "tokens/s": _speed(assisted),
        "tokens/s alone": _speed(alone),
        "speedup": Estimate(statistics.median(speedups), math.nan, len(speedups)),
    }


def _ratio(numerators: Sequence[int], denominators: Sequence[int]) -> Estimate:
    """sum a / sum b over prompts, and its standard error sqrt(R / (R - 1) sum_r (a_r - ratio b_r)^2) / sum b."""
    total, count = sum(denominators), len(denominators)
    if not total:
        return Estimate(math.nan, math.nan, 0)
    ratio = sum(numerators) / total
    squares = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return Estimate(ratio, math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.nan, total)


def _speed(found: list[Continuation]) -> Estimate:
    tokens = sum(len(c.tokens) for c in found)
    return Estimate(tokens / sum(c.seconds for c in found), math.nan, tokens)


def first_turns(path: str, limit: int | None = None) -> list[str]:
    """The first user turns of a file of prompts: the first of `turns`, as in MT-bench, or `prompt`.

    Raises:
        DataError: A row has neither; or as `language.data.sources.read_rows`.
    """
    prompts = []
    for row in read_rows(path, "test")[:limit]:
        turns = row.values.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.values.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.origin}: no prompt; give the row `turns`, a list of texts, or `prompt`, a text")
        prompts.append(text)
    return prompts


def measure_command(
    *,
    ckpt: Path,
    prompts: str,
    out: Path,
    limit: int | None = None,
    format: FormatName | None = None,
    use_chat_template: bool | None = None,
    device: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a draft against its target.

    Args:
        ckpt: Checkpoint of python -m language.draft fit.
        prompts: Rows with turns (MT-bench) or prompt.
        out: JSON file to write.
        limit: Prompts to use; default all.
        format: The training's data.format, which newer checkpoints hold; where it is not known prompts stand as they
            are.
        use_chat_template: The training's data.use_chat_template.
        device: `cuda` or `cpu`; by default `cuda` where there is one.
        settings: Those of `DecodingSettings`.

    Returns:
        What was written.

    Raises:
        AdapterError: The checkpoint is missing, torn or another class's, or a value is out of range.
        DataError: There are no prompts, or as `first_turns`.
    """
    decoding = DecodingSettings(**settings)
    if limit is not None:
        check_whole("limit", limit)
    device = device or default_device()
    texts = first_turns(prompts, limit)
    tuner = load_tuner(ckpt, DraftTuner, "language.draft").to(device)
    draft, report = merged_draft(tuner)
    room = min(context_length(model) or sys.maxsize for model in (tuner.target, draft)) - decoding.max_new_tokens
    meaning = meaning_of(tuner.model)  # type: ignore[arg-type]
    rows = [prompt_tokens(tuner.tokenizer, text, format, use_chat_template, room, meaning) for text in texts]
    found = measure(tuner.target, draft, rows, decoding, tuner.tokenizer.eos_token_id)
    results = {name: {"metrics": metrics} for name, metrics in found.items()}
    result = {
        "ckpt": str(ckpt),
        "prompts": prompts,
        "limit": limit,
        "format": format,
        "use_chat_template": use_chat_template,
        "device": device,
        "settings": asdict(decoding),
        "merged": str(report),
        "results": results,
        "versions": versions(),
    }
    write_json(out, result)
    print(table(results))
    print(f"written to {out}")
    return result


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was written."""
    return console.call(measure_command, args, "python -m language.draft.speculative")


if __name__ == "__main__":
    run(main)
