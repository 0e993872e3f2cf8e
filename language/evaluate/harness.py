"""The tasks of EleutherAI's lm-evaluation-harness (extra `eval`), asked of a model with adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from language.evaluate.metrics import Estimate
from language.evaluate.tasks import EvalSettings
from lit_adapters.errors import DataError
from lit_adapters.model.modes import evaluating

PREFIX = "lm_eval:"  # before the name of a task of the harness


def plan_harness(
    names: Sequence[str], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> Callable[[], dict[str, dict[str, Any]]]:
    """Find tasks of the harness; what is returned asks the model and gives the metrics of each task.

    Args:
        names: Tasks and groups of tasks, with or without the prefix "lm_eval:".
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        s: `harness_tasks`, `limit`, `batch_size` and `seed` count. The number of examples is the task's own.

    Raises:
        DataError: The package `lm_eval` is missing, or it does not know a task.
    """
    tasks = [name.removeprefix(PREFIX) for name in names]
    manager = _task_manager(tasks, s.harness_tasks)
    return lambda: as_results(_run(model, tokenizer, tasks, manager, s))


def run_harness(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], s: EvalSettings) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns: `results` by task, `samples` with every log-likelihood, versions.

    Arguments and errors are those of `plan_harness`.
    """
    return _run(model, tokenizer, tasks, _task_manager(tasks, s.harness_tasks), s)


def as_results(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness's results as ours: "lm_eval:TASK" to `metrics`, whose names are METRIC or METRIC (FILTER)."""
    results: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        metrics = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            stderr = float(error) if isinstance(error, (int, float)) else math.nan  # "N/A" where it has none
            metrics[metric if chosen == "none" else f"{metric} ({chosen})"] = Estimate(float(value), stderr, count)
        results[f"{PREFIX}{task}"] = {"metrics": metrics}
    return results


def _task_manager(tasks: Sequence[str], folder: str | None) -> Any:
    """The harness's index of tasks: those of a folder of YAML files, or its own."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError("the harness needs the package `lm_eval`: pip install 'lit-adapters[eval]'") from error
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"harness_tasks {folder} is not a folder: give the one with the harness's YAML files")
    # Without its own tasks, thousands of files, the manager starts in no time.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        known = "`lm_eval ls tasks` lists them" if folder is None else f"{folder} has {', '.join(manager.all_tasks)}"
        raise DataError(f"lm_eval knows no tasks {', '.join(unknown)}: {known}")
    return manager


def _run(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], manager: Any, s: EvalSettings) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=s.batch_size)
        seeds = {f"{name}_random_seed": s.seed for name in ("numpy", "torch", "fewshot")}
        result: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), task_manager=manager, limit=s.limit, random_seed=s.seed, **seeds
        )
    assert result is not None  # None is for processes other than the first
    return result
