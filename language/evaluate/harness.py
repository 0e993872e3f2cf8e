"""The same model under EleutherAI's lm-evaluation-harness (extra ``eval``): its own tasks, or local questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from language.evaluate.questions import Question
from lit_adapters.errors import DataError
from lit_adapters.model.modes import evaluating


def write_task(folder: str | Path, name: str, questions: Sequence[Question]) -> None:
    """Write questions as a multiple-choice task of the harness: ``NAME.yaml`` and ``NAME.jsonl``; no hub is needed.

    Args:
        folder: Created if missing.
        name: Of the task.
        questions: Their prompts are used as they are, examples included.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def run_harness(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model, adapted or not, with lm-evaluation-harness.

    Args:
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        tasks: Names of tasks.
        folder: Whose tasks to use: where ``write_task`` wrote, or any folder of the harness's YAML files. Default the
            harness's own, which fetch their data from the hub.
        batch_size: Rows in a pass.
        limit: Questions of each task; default all.
        seed: Seeds examples and the bootstrap.

    Returns:
        What ``lm_eval.simple_evaluate`` returns: ``results`` by task, ``samples`` with every log-likelihood, versions.

    Raises:
        DataError: The package ``lm_eval`` is missing, or it does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError("the harness needs the package `lm_eval`: pip install 'lit-adapters[eval]'") from error
    # Without its defaults, thousands of files, the manager starts in no time.
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        known = "`lm_eval ls tasks` lists them" if folder is None else f"{folder} has {', '.join(manager.all_tasks)}"
        raise DataError(f"lm_eval knows no tasks {', '.join(unknown)}: {known}")
    with evaluating(model):
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        seeds = {f"{name}_random_seed": seed for name in ("numpy", "torch", "fewshot")}
        result: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), task_manager=manager, limit=limit, random_seed=seed, **seeds
        )
    assert result is not None  # None is for processes other than the first
    return result
