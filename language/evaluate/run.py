"""Evaluation in one call: load a model, ask it the questions of several tasks, score its answers.

lm-evaluation-harness asks and scores. The questions of our own tasks come from local files and are asked in the words
of the training. The harness does not measure the loss of held-out rows; our own code does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import lit_adapters as la
from language.data.sources import is_address
from language.evaluate.metrics import held_out_loss, row_losses
from language.evaluate.questions import COMMONSENSE
from language.evaluate.results import versions
from language.evaluate.settings import PREFIX, EvalSettings, as_trained
from language.evaluate.tasks import held_out_rows, read_questions
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
        if name not in TASKS and (not name.startswith(PREFIX) or name == PREFIX):
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
        `results` holds for each task `metrics` (name to `Estimate`), the number of `truncated` prompts, the `answers`
        of the model and the `right` ones, in the order of the questions. MMLU, in the order of its subjects, has the
        metrics `micro`, which counts each question once, and `macro`, the mean over subjects, both also in
        `categories`, and the accuracy of its `subjects`. Beside it: `settings`, `versions` and `seconds`.

    Raises:
        DataError: A task is unknown, its data are missing or bad (file and line), or `lm_eval` is not installed.
        AdapterError: The model's output is not a number.
    """
    settings = as_trained(settings or EvalSettings(), meaning_of(model))
    started = time.perf_counter()
    names = task_names(tasks)
    check_data(names, root, settings)
    data = (
        held_out_rows(settings.place("perplexity", root), model, tokenizer, settings) if "perplexity" in names else None
    )
    ours = [name for name in names if name != "perplexity" and not name.startswith(PREFIX)]
    asked = {name: read_questions(name, tokenizer, root, settings, meaning_of(model)) for name in ours}
    theirs = [name for name in names if name.startswith(PREFIX)]
    ask_harness = _harness().plan_harness(theirs, model, tokenizer, settings) if theirs else dict
    results = _harness().ask(asked, model, tokenizer, settings) if asked else {}
    if data is not None:
        results["perplexity"] = {"metrics": held_out_loss(row_losses(model, data.test_dataloader()))}
    results |= ask_harness()
    seconds = time.perf_counter() - started
    return {"results": results, "settings": asdict(settings), "versions": versions(), "seconds": round(seconds, 1)}


def _harness() -> Any:
    """The module that asks through lm-evaluation-harness."""
    try:
        return import_module("language.evaluate.harness")
    except ImportError as error:
        raise DataError(f"{error}: all tasks but perplexity need pip install 'lit-adapters[eval]'") from error


def load(
    model: str | None,
    adapters: str | None = None,
    ckpt: str | None = None,
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer: by name, with adapters of a directory, or from a checkpoint of training.

    Args:
        model: Name, directory or file, as in `language.models.create_model`; a checkpoint knows its own.
        adapters: Directory that `lit_adapters.save_adapters` wrote.
        ckpt: Checkpoint of `CausalLMTuner`; instead of all others.
        dtype: Type of the weights; float32 by default.
        quantization: "nf4" for 4-bit weights.

    Raises:
        DataError: Neither or both of model and ckpt are given, or what the checkpoint knows beside it.
        AdapterError: The files cannot be loaded or do not belong together.
    """
    if (model is None) == (ckpt is None) or (ckpt and adapters):
        raise DataError(
            f"model={model}, adapters={adapters}, ckpt={ckpt}: give a model, perhaps with adapters, or a checkpoint"
        )
    if ckpt is not None:
        if dtype is not None or quantization is not None:
            raise DataError(
                f"dtype={dtype}, quantization={quantization} beside a checkpoint, whose weights stay as they were "
                "trained: leave them out"
            )
        module = load_tuner(Path(ckpt), CausalLMTuner, "language")
        base: Any = module.model
        tokenizer = module.tokenizer
    else:
        assert model is not None
        tokenizer = create_tokenizer(model)
        base = create_model(model, dtype=dtype or "float32", quantization=quantization)
        if adapters is not None:
            la.load_adapters(base, adapters)
        apply_meaning(base, tokenizer)
    if torch.cuda.is_available():
        base = base.cuda()
    return base.eval(), tokenizer
