"""Through lm-evaluation-harness: questions of local files as its tasks, its own tasks, and results of both as ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from language.evaluate.likelihood import Score, likeliest
from language.evaluate.lm import SharedPromptLM, TrainedPromptLM
from language.evaluate.metrics import ROUGE_KEYS, Estimate, find_option, normalised, rouge
from language.evaluate.mmlu import CATEGORIES
from language.evaluate.questions import COMMONSENSE, Question
from language.evaluate.settings import PREFIX, EvalSettings
from lit_adapters.errors import DataError
from lit_adapters.model.modes import evaluating


class QuestionTask(ConfigurableTask):
    """Questions as a task of the harness.

    Choices are made by log-likelihood: `acc` by the sum, `acc_bytes` by the sum for each byte. Or the answer is looked
    for in generated text: `acc` counts the option that the text names first, `exact_match` texts that are the option,
    `answered` texts that name any. Texts to write have ROUGE.

    Args:
        name: Of the task.
        questions: All with choices, or none.
        max_new_tokens: Longest generated text; None to choose by log-likelihood.
    """

    def __init__(self, name: str, questions: Sequence[Question], max_new_tokens: int | None = None) -> None:
        self.questions = questions
        settings: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        metrics: tuple[str, ...] = ("acc", "acc_bytes")
        if max_new_tokens is not None:
            generation = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False}
            settings = {"output_type": "generate_until", "generation_kwargs": generation, "process_results": _scored}
            metrics = ("acc", "exact_match", "answered") if questions[0].choices else ROUGE_KEYS
        settings["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
        asked = {"doc_to_text": "prompt", "doc_to_target": "answer", "target_delimiter": "", "num_fewshot": 0}
        super().__init__(config={"task": name, "test_split": "test", **asked, **settings})

    def download(self, *_: Any, **__: Any) -> None:
        """Write the questions as documents."""
        rows = [{"prompt": q.prompt.text, "choices": list(q.choices), "answer": q.answer} for q in self.questions]
        self.dataset = {"test": Dataset.from_list(rows)}

    def build_all_requests(self, **settings: Any) -> None:
        """Write the requests, without the progress bar that each of MMLU's 57 subjects would have."""
        with redirect_stderr(StringIO()):
            super().build_all_requests(**settings)


def ask(
    asked: Mapping[str, Sequence[Question]], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> dict[str, dict[str, Any]]:
    """Results of tasks whose questions are given, as `language.evaluate.run.evaluate` describes them.

    Args:
        asked: The questions of each task. Those of MMLU are a task for each subject.
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        s: How to ask.

    Raises:
        DataError: A choice has no tokens, or an answer does not fit into the context.
        AdapterError: The model's output is not a number.
    """
    parts: dict[str, dict[str, QuestionTask]] = {}
    for name, questions in asked.items():
        generated = not questions[0].choices or (s.answers == "generation" and name != "mmlu")
        longest = s.max_new_tokens if generated else None
        if name == "mmlu":
            subjects: dict[str, list[Question]] = {}
            for question in questions:
                subjects.setdefault(question.group, []).append(question)
            parts[name] = {subject: QuestionTask(f"mmlu {subject}", of) for subject, of in subjects.items()}
        else:
            parts[name] = {"": QuestionTask(name, questions, longest)}
    tasks = {task.task_name: task for of_name in parts.values() for task in of_name.values()}
    with evaluating(model):
        prompts = [q.prompt for questions in asked.values() for q in questions]
        lm = TrainedPromptLM(model, tokenizer, prompts, s.batch_size, s.max_length)
        if s.max_new_tokens >= lm.max_length and any(t.OUTPUT_TYPE == "generate_until" for t in tasks.values()):
            raise DataError(
                f"max_new_tokens={s.max_new_tokens} leaves no room for a prompt in the {lm.max_length} tokens that the "
                "model reads: lower it"
            )
        found: Any = lm_eval.evaluate(lm, {"tasks": tasks})
    results = {name: _result(of_name, found, lm.truncated) for name, of_name in parts.items()}
    if set(COMMONSENSE) <= set(results):
        each = [results[name]["metrics"] for name in COMMONSENSE]
        results["commonsense"] = {"metrics": {metric: average([m[metric] for m in each]) for metric in each[0]}}
    return results


def average(parts: Sequence[Estimate], by_size: bool = False) -> Estimate:
    """The harness's mean of tasks, each counting the same or by its questions.

    Args:
        parts: One estimate for each task.
        by_size: Whether each question counts the same.
    """
    values, errors, sizes = [p.value for p in parts], [p.stderr for p in parts], [p.n for p in parts]
    if any(map(math.isnan, errors)):
        error = math.nan
    else:
        error = pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors)
    return Estimate(aggregate_subtask_metrics(values, sizes, by_size), error, sum(sizes))


def plan_harness(
    names: Sequence[str], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> Callable[[], dict[str, dict[str, Any]]]:
    """Find tasks of the harness; what is returned asks the model and gives the metrics of each task.

    Args:
        names: Tasks and groups of tasks, with the prefix "lm_eval:".
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        s: `harness_tasks`, `limit`, `batch_size`, `max_length` and `seed` count. The number of examples is the task's.

    Raises:
        DataError: The harness does not know a task, or cannot load its data.
    """
    asked = [name.removeprefix(PREFIX) for name in names]
    manager = _task_manager(asked, s.harness_tasks)
    try:
        loaded = manager.load(asked)
    except Exception as error:  # of a data set that cannot be fetched or read, or of a task file
        raise DataError(f"lm_eval cannot load {', '.join(asked)}: {type(error).__name__}: {error}") from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(s.seed)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)

    def ask_harness() -> dict[str, dict[str, Any]]:
        with evaluating(model):
            lm = SharedPromptLM(model, tokenizer, s.batch_size, s.max_length)
            found: Any = lm_eval.evaluate(lm, loaded, limit=s.limit)
        results: dict[str, dict[str, Any]] = {
            f"{PREFIX}{task}": {"metrics": estimates(values)} for task, values in found["results"].items()
        }
        for task, samples in found["samples"].items():
            prompts = [sample["arguments"][0][0] for sample in samples]
            results[f"{PREFIX}{task}"]["truncated"] = sum(prompt in lm.truncated for prompt in prompts)
        return results

    return ask_harness


def estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    """The harness's values of a task, such as "acc,none", as `acc`, or `METRIC (FILTER)` where there is a filter."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        stderr = float(error) if isinstance(error, Real) else math.nan  # "N/A" where it has none
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        found[name] = Estimate(float(value), stderr, int(values.get("sample_len", 0)))
    return found


def _result(tasks: Mapping[str, QuestionTask], found: Mapping[str, Any], truncated: set[str]) -> dict[str, Any]:
    """The result of a task, or of MMLU from its tasks by subject."""
    questions = [q for task in tasks.values() for q in task.questions]
    metrics = {group: estimates(found["results"][task.task_name]) for group, task in tasks.items()}
    result: dict[str, Any] = {
        "truncated": sum(q.prompt.text in truncated for q in questions),
        "answers": [answer for task in tasks.values() for answer in _answers(task, found)],
        "right": [q.answer for q in questions],
    }
    if "" in metrics:
        return {"metrics": metrics[""], **result}

    def averages(subjects: Iterable[str]) -> dict[str, Estimate]:
        each = [metrics[subject]["acc"] for subject in subjects]
        return {"micro": average(each, by_size=True), "macro": average(each)}

    category = {q.group: q.category for q in questions}
    members = {name: [subject for subject in tasks if category[subject] == name] for name in CATEGORIES}
    return {
        "metrics": averages(tasks),
        **result,
        "categories": {name: averages(subjects) for name, subjects in members.items() if subjects},
        "subjects": {subject: of_subject["acc"] for subject, of_subject in metrics.items()},
    }


def _answers(task: QuestionTask, found: Mapping[str, Any]) -> list[str]:
    """What the model answered: the choice it made, or the text it wrote."""
    samples = sorted(found["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    given = [sample["filtered_resps"] for sample in samples]
    if task.OUTPUT_TYPE == "generate_until":
        return [text for (text,) in given]
    chosen = [likeliest([Score(*score) for score in scores]) for scores in given]
    return [q.choices[index] for q, index in zip(task.questions, chosen, strict=True)]


def _scored(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Metrics of a generated text."""
    (text,) = results
    if not document["choices"]:
        return rouge(text, document["answer"])
    options, right = [choice.strip() for choice in document["choices"]], document["answer"].strip()
    found = find_option(text, options)
    return {
        "acc": found is not None and options[found] == right,
        "exact_match": normalised(text) == normalised(right),
        "answered": found is not None,
    }


def _task_manager(tasks: Sequence[str], folder: str | None) -> TaskManager:
    """The harness's index of tasks: those of a folder of YAML files, or its own."""
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"harness_tasks {folder} is not a folder: give the one with the harness's YAML files")
    # Without its own tasks, thousands of files, the manager starts in no time.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        known = "`lm_eval ls tasks` lists them" if folder is None else f"{folder} has {', '.join(manager.all_tasks)}"
        raise DataError(f"lm_eval knows no tasks {', '.join(unknown)}: {known}")
    return manager
