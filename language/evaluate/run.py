"""Evaluation in one call: load a model, ask it the questions of several tasks, score its answers.

Our own tasks stand beside those of lm-evaluation-harness because they read local files, ask in the words of the
training, and score a prompt's choices on one reading of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import lit_adapters as la
from language.data.sources import is_address
from language.evaluate.harness import PREFIX, plan_harness
from language.evaluate.metrics import mean_of_groups
from language.evaluate.questions import COMMONSENSE
from language.evaluate.results import versions
from language.evaluate.tasks import EvalSettings, as_trained, plan
from language.meaning import apply_meaning
from language.models import Dtype, Quantization, create_model, create_tokenizer
from language.module import CausalLMTuner, load_tuner
from lit_adapters.errors import DataError
from lit_adapters.files.meaning import meaning_of

TASKS = ("mmlu", *COMMONSENSE, "classification", "summarisation", "perplexity")


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """Tasks of a comma-separated text or a list, "commonsense" spelled out; each once.

    Raises:
        DataError: A task is unknown.
    """
    listed = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [n for task in listed for n in (COMMONSENSE if task.strip() == "commonsense" else [task.strip()])]
    for name in names:
        if name not in TASKS and not name.startswith(PREFIX):
            raise DataError(
                f"task {name!r} is unknown: use {', '.join(TASKS)}, commonsense for those eight, or {PREFIX}NAME for a "
                "task of lm-evaluation-harness"
            )
    return list(dict.fromkeys(names))


def check_data(names: Sequence[str], root: str | Path | None, settings: EvalSettings) -> None:
    """Check that there are data for the tasks, before a model is loaded.

    Raises:
        DataError: `root` is no folder, or the data of a task do not exist.
    """
    if root is not None and not Path(root).is_dir():
        raise DataError(f"root {root} is not a folder: give the one with the data, or give their paths alone")
    for name in names:
        setting = "commonsense" if name in COMMONSENSE else name
        if name.startswith(PREFIX):
            continue
        place = settings.place(setting, root)
        if not is_address(place) and not Path(place).expanduser().exists():
            raise DataError(
                f"task {name} finds no data at {place}: give --{setting} a file, a folder or a name on the hub "
                "(hub:NAME), or --root the folder that it is in"
            )


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: str | Sequence[str],
    root: str | Path | None = None,
    settings: EvalSettings | None = None,
) -> dict[str, Any]:
    """Ask a model, adapted or not, and score its answers. All files are read before the first question is asked.

    Args:
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        tasks: Names from `TASKS`, "commonsense" for its eight, or "lm_eval:NAME" for a task of the harness.
        root: Folder that the paths of `settings` are in; by default the working directory.
        settings: How to ask.

    Returns:
        `results` holds for each task `metrics` (name to `Estimate`), `truncated` prompts and, where there are choices,
        `predictions` and `answers` (indices, in the order of the questions), for MMLU also `categories` and
        `subjects`. Beside it: `settings`, `versions` and `seconds`.

    Raises:
        DataError: A task is unknown, its data are missing or bad (file and line), or `lm_eval` is not installed.
        AdapterError: The model's output is not a number.
    """
    settings = as_trained(settings or EvalSettings(), meaning_of(model))
    started = time.perf_counter()
    names = task_names(tasks)
    check_data(names, root, settings)
    ours = [name for name in names if not name.startswith(PREFIX)]
    theirs = [name for name in names if name.startswith(PREFIX)]
    planned = {name: plan(name, model, tokenizer, root, settings) for name in ours}
    ask_harness = plan_harness(theirs, model, tokenizer, settings) if theirs else dict
    results = {name: planned[name]() for name in tqdm(ours, desc="tasks", disable=len(ours) < 2)}
    if set(COMMONSENSE) <= set(results):
        parts = [results[name]["metrics"] for name in COMMONSENSE]
        results["commonsense"] = {"metrics": {key: mean_of_groups([part[key] for part in parts]) for key in parts[0]}}
    results |= ask_harness()
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
        model: Name, directory or file, as in `language.models.create_model`; a checkpoint knows its own.
        adapters: Directory that `lit_adapters.save_adapters` wrote.
        ckpt: Checkpoint of `CausalLMTuner`; instead of the others.
        dtype: Type of the weights.
        quantization: "nf4" for 4-bit weights.

    Raises:
        DataError: Neither or both of model and ckpt are given.
        AdapterError: The files cannot be loaded or do not belong together.
    """
    if (model is None) == (ckpt is None) or (ckpt and adapters):
        raise DataError(
            f"model={model}, adapters={adapters}, ckpt={ckpt}: give a model, perhaps with adapters, or a checkpoint"
        )
    if ckpt is not None:
        module = load_tuner(Path(ckpt), CausalLMTuner, "language")
        base: Any = module.model
        tokenizer = module.tokenizer
    else:
        assert model is not None
        tokenizer = create_tokenizer(model)
        base = create_model(model, dtype=dtype, quantization=quantization)
        if adapters is not None:
            la.load_adapters(base, adapters)
        apply_meaning(base, tokenizer)
    if torch.cuda.is_available():
        base = base.cuda()
    return base.eval(), tokenizer
