"""Speculative decoding, measured: python -m language.draft.speculative --ckpt FILE --prompts FILE --out result.json

The measures are those of `measure`; the decoding is `language.decoding`.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

from language.data.formats import FormatName
from language.data.sources import read_rows
from language.draft.decoding import Continuation, Settings, continued
from language.draft.module import DraftTuner, merged_draft
from language.evaluate.metrics import Estimate, proportion
from language.evaluate.results import table, versions, write_json
from language.models import context_length
from language.module import load_tuner
from language.prompt import prompt_tokens
from lit_adapters.errors import DataError
from lit_adapters.lightning.cli import run


def measure(
    target: Any, draft: Any, prompts: Sequence[Sequence[int]], settings: Settings
) -> dict[str, dict[str, Estimate]]:
    """Continue every prompt with and without the draft, in turns, at each temperature.

    Args:
        target: a causal language model of transformers.
        draft: another, of the same vocabulary; with or without adapters.
        prompts: token ids.
        settings: how to decode.

    Returns:
        For each `temperature T`:

        - `accepted length`: new tokens a pass of the target, its own one included; from 1 to K + 1.
        - `acceptance`: accepted tokens of those proposed. What follows a rejected token counts as proposed.
        - `identical` (temperature 0 only): share of prompts whose tokens are those of the target alone. In exact
          arithmetic all are. In floating point the target rounds differently when it reads several tokens at once, and
          near-ties may go the other way: hardly in float32, often in bfloat16.
        - `tokens/s`, `tokens/s alone`: new tokens a second, reading the prompt included, with the draft and without.
        - `speedup`: median over prompts of the ratio of the two.

        Standard errors take prompts as drawn independently; those of speeds are not estimated.

    Raises:
        DataError: no prompts.
        AdapterError: as `continued`.
    """
    if not prompts:
        raise DataError("there are no prompts to continue: check the file and the limit")
    for helper in (None, draft):  # the first call of each kind is slower
        continued(target, prompts[0], settings, draft=helper)
    results = {}
    for temperature in settings.temperatures:
        alone: list[Continuation] = []
        assisted: list[Continuation] = []
        for index, prompt in enumerate(tqdm(prompts, desc=f"temperature {temperature:g}", delay=1.0)):
            turns = [(alone, None), (assisted, draft)]
            for found, helper in turns if index % 2 == 0 else turns[::-1]:
                found.append(continued(target, prompt, settings, temperature, helper, settings.seed + index))
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
        DataError: a row has neither; or as `language.sources.read_rows`.
    """
    prompts = []
    for row in read_rows(path, "test")[:limit]:
        turns = row.values.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.values.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.origin}: no prompt; give the row `turns`, a list of texts, or `prompt`, a text")
        prompts.append(text)
    return prompts


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was written."""
    parser = ArgumentParser(
        prog="python -m language.draft.speculative", description="Measure a draft against its target."
    )
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of python -m language.draft fit")
    parser.add_argument("--prompts", type=str, required=True, help="rows with `turns` (MT-bench) or `prompt`")
    parser.add_argument("--out", type=str, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int | None, help="prompts to use; default all")
    parser.add_argument("--format", type=FormatName | None, help="data.format of the training; default: no frame")
    parser.add_argument("--use_chat_template", type=bool, default=False, help="data.use_chat_template of the training")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_class_arguments(Settings)
    given = parser.parse_args(args).as_dict()
    what = {name: given.pop(name) for name in ("ckpt", "prompts", "limit", "format", "use_chat_template", "device")}
    out, settings = given.pop("out"), Settings(**given)
    texts = first_turns(what["prompts"], what["limit"])
    tuner = load_tuner(Path(what["ckpt"]), DraftTuner, "language.draft").to(what["device"])
    draft, report = merged_draft(tuner)
    room = min(context_length(model) or sys.maxsize for model in (tuner.target, draft)) - settings.max_new_tokens
    rows = [prompt_tokens(tuner.tokenizer, t, what["format"], what["use_chat_template"], room) for t in texts]
    found = measure(tuner.target, draft, rows, settings)
    results = {name: {"metrics": metrics} for name, metrics in found.items()}
    result = {**what, "settings": asdict(settings), "merged": str(report), "results": results, "versions": versions()}
    write_json(Path(out), result)
    print(table(results))
    print(f"written to {out}")
    return result


if __name__ == "__main__":
    run(main)
