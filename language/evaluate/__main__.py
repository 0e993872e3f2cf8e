"""Evaluation: python -m language.evaluate --model NAME --tasks mmlu,perplexity --root DIR --out result.json

Multiple choice by log-likelihood (MMLU, common-sense reasoning, classification), the same by generation, ROUGE of
summaries, and held-out perplexity; each number with its standard error.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm
from transformers import PreTrainedModel

import lit_adapters as la
from language.evaluate.metrics import mean_of_groups
from language.evaluate.questions import COMMONSENSE
from language.evaluate.results import table, versions, write_json
from language.evaluate.tasks import Settings, plan
from language.models import Dtype, Quantization, create_model, create_tokenizer
from lit_adapters.errors import DataError
from lit_adapters.lightning.cli import run

TASKS = ("mmlu", *COMMONSENSE, "classification", "summarisation", "perplexity")


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """Tasks of a comma-separated text or a list, "commonsense" spelled out; each once.

    Raises:
        DataError: An unknown task, or none.
    """
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [n for task in given for n in (COMMONSENSE if task.strip() == "commonsense" else [task.strip()])]
    for name in names:
        if name not in TASKS:
            raise DataError(f"task {name!r} is unknown: use {', '.join(TASKS)}, or commonsense for those eight")
    return list(dict.fromkeys(names))


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: str | Sequence[str],
    root: str | Path,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Ask a model, adapted or not, and score its answers. All files are read before the first question is asked.

    Args:
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        tasks: Of ``TASKS``, and "commonsense" for its eight.
        root: Folder of the data.
        settings: How to ask.

    Returns:
        ``results`` holds for each task ``metrics`` (name to ``Estimate``), ``truncated`` prompts and, where there are
        choices, ``predictions`` and ``answers`` (indices, in the order of the questions), for MMLU also
        ``categories`` and ``subjects``. Beside it: ``settings``, ``versions`` and ``seconds``.

    Raises:
        DataError: An unknown task, or missing or bad data (file and line).
        AdapterError: The model's output is not a number.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    names = task_names(tasks)
    planned = {name: plan(name, model, tokenizer, Path(root), settings) for name in names}
    results = {name: planned[name]() for name in tqdm(names, desc="tasks", disable=len(names) == 1)}
    if set(COMMONSENSE) <= set(results):
        parts = [results[name]["metrics"] for name in COMMONSENSE]
        results["commonsense"] = {"metrics": {key: mean_of_groups([part[key] for part in parts]) for key in parts[0]}}
    seconds = time.perf_counter() - started
    return {"results": results, "settings": asdict(settings), "versions": versions(), "seconds": round(seconds, 1)}


def load(
    model: str | None,
    adapters: str | None = None,
    ckpt: str | None = None,
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer: by name, with adapters of a directory, or from a checkpoint of training.

    Args:
        model: Name, directory or file, as in ``language.models.create_model``; a checkpoint knows its own.
        adapters: What ``lit_adapters.save_adapters`` wrote.
        ckpt: Checkpoint of ``CausalLMTuner``; instead of the others.
        dtype: Of the weights.
        quantization: "nf4" for 4-bit weights.

    Raises:
        DataError: Neither or both of model and ckpt.
        AdapterError: The files cannot be loaded or do not belong together.
    """
    if (model is None) == (ckpt is None) or (ckpt and adapters):
        raise DataError(
            f"model={model}, adapters={adapters}, ckpt={ckpt}: give a model, perhaps with adapters, or a checkpoint"
        )
    if ckpt is not None:
        from language.module import CausalLMTuner

        if not zipfile.is_zipfile(ckpt):
            raise DataError(f"checkpoint {ckpt} does not exist or is torn: give a file that fit has written")
        module = CausalLMTuner.load_from_checkpoint(ckpt, map_location="cpu")
        base: Any = module.model
        tokenizer = module.tokenizer
    else:
        assert model is not None
        tokenizer = create_tokenizer(model)
        base = create_model(model, dtype=dtype, quantization=quantization)
        if adapters is not None:
            la.load_adapters(base, adapters)
    if torch.cuda.is_available():
        base = base.cuda()
    return base.eval(), tokenizer


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was written."""
    parser = ArgumentParser(prog="python -m language.evaluate", description="Evaluate a language model with adapters.")
    parser.add_argument("--model", type=str | None, help="name, directory or .gguf file")
    parser.add_argument("--adapters", type=str | None, help="directory that save_adapters wrote")
    parser.add_argument("--ckpt", type=str | None, help="checkpoint of python -m language fit, instead of --model")
    parser.add_argument("--dtype", type=Dtype, default=get_args(Dtype)[0], help="of the weights")
    parser.add_argument("--quantization", type=Quantization | None, help="nf4 for 4-bit weights")
    parser.add_argument("--tasks", type=str, required=True, help=f"comma-separated: commonsense, {', '.join(TASKS)}")
    parser.add_argument("--root", type=str, required=True, help="folder of the data")
    parser.add_argument("--out", type=str, required=True, help="JSON file to write")
    parser.add_class_arguments(Settings)
    given = parser.parse_args(args).as_dict()
    what = {name: given.pop(name) for name in ("model", "adapters", "ckpt", "dtype", "quantization")}
    tasks, root, out = task_names(given.pop("tasks")), given.pop("root"), given.pop("out")
    if not Path(root).is_dir():
        raise DataError(f"root {root} is no folder: give the one with the data")
    result = {**what, **evaluate(*load(**what), tasks, root, Settings(**given))}
    write_json(out, result)
    print(table(result["results"]))
    print(f"written to {out}")
    return result


if __name__ == "__main__":
    run(main)
