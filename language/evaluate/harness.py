"""Tasks of lm-evaluation-harness: questions of local files as its tasks, its own tasks, and results of both as ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
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
from language.evaluate.metrics import Estimate, find_option, normalised, rouge
from language.evaluate.mmlu import CATEGORIES
from language.evaluate.questions import Question, WritingTask
from language.evaluate.tasks import PREFIX, EvalSettings
from lit_adapters.errors import DataError
from lit_adapters.model.modes import evaluating

_CHOICE_METRICS = ("acc", "acc_bytes")
_Answer = Callable[[dict[str, Any], Sequence[str]], Mapping[str, float]]


class LocalTask(ConfigurableTask):
    """A task of the harness whose documents are given.

    Args:
        name: Of the task.
        documents: Each with `prompt` and `answer`, and `choices` if there are.
        settings: Those of a task file of the harness.
    """

    def __init__(self, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
        self.documents = documents
        asked = {"doc_to_text": "prompt", "doc_to_target": "answer", "target_delimiter": "", "num_fewshot": 0}
        super().__init__(config={"task": name, "test_split": "test", **asked, **settings})

    def download(self, *_: Any, **__: Any) -> None:
        """Take the documents."""
        self.dataset = {"test": Dataset.from_list(self.documents)}

    def build_all_requests(self, **settings: Any) -> None:
        """Write the requests, without the progress bar that each of MMLU's 57 subjects would have."""
        with redirect_stderr(StringIO()):
            super().build_all_requests(**settings)


def choices(name: str, questions: Sequence[Question]) -> LocalTask:
    """Questions whose answers are chosen by log-likelihood; `acc` by the sum, `acc_bytes` by the sum for each byte."""
    return LocalTask(
        name,
        _documents(questions),
        output_type="multiple_choice",
        doc_to_choice="choices",
        metric_list=_means(_CHOICE_METRICS),
    )


def answers(name: str, questions: Sequence[Question], max_new_tokens: int) -> LocalTask:
    """Questions whose answers are looked for in generated text.

    `acc` counts the option that the text names first, `exact_match` texts that are the option, and `answered` texts
    that name any.
    """
    options = {q.prompt: q.options for q in questions}

    def process(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        allowed, answer = options[document["prompt"]], document["answer"]
        found = find_option(results[0], allowed)
        return {
            "acc": found == answer,
            "exact_match": normalised(results[0]) == normalised(allowed[answer]),
            "answered": found is not None,
        }

    return _generated(name, _documents(questions), max_new_tokens, process, ("acc", "exact_match", "answered"))


def summaries(name: str, tasks: Sequence[WritingTask], max_new_tokens: int) -> LocalTask:
    """Texts to write, scored by ROUGE against the reference."""
    documents = [{"prompt": task.prompt, "answer": task.reference} for task in tasks]

    def process(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        return rouge(results[0], document["answer"])

    return _generated(name, documents, max_new_tokens, process, ("rouge1", "rouge2", "rougeL"))


def ask_questions(
    name: str, questions: Sequence[Question], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> dict[str, Any]:
    """The result of a task with choices.

    Returns:
        `metrics`, `truncated` prompts, and `predictions` and `answers`, indices in the order of the questions. MMLU has
        `micro`, which counts each question once, and `macro`, the mean over subjects, also for each of its
        `categories`, and the accuracy of its `subjects`.

    Raises:
        DataError: A choice has no tokens or does not fit into the context.
        AdapterError: The model's output is not a number.
    """
    if name == "mmlu":
        return _mmlu(questions, model, tokenizer, s)
    task = choices(name, questions) if s.answers == "choice" else answers(name, questions, s.max_new_tokens)
    found, lm = _ask([task], _prompts(questions), model, tokenizer, s)
    return {
        "metrics": estimates(found["results"][name]),
        "truncated": sum(q.prompt in lm.truncated for q in questions),
        "predictions": [
            _predicted(responses, q) for responses, q in zip(_responses(found, name), questions, strict=True)
        ],
        "answers": [q.answer for q in questions],
    }


def ask_summaries(
    name: str, tasks: Sequence[WritingTask], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> dict[str, Any]:
    """The result of a task of writing: `metrics`, `truncated` prompts and the `texts`. Errors as `ask_questions`."""
    found, lm = _ask([summaries(name, tasks, s.max_new_tokens)], _prompts(tasks), model, tokenizer, s)
    return {
        "metrics": estimates(found["results"][name]),
        "truncated": sum(task.prompt in lm.truncated for task in tasks),
        "texts": [text for (text,) in _responses(found, name)],
    }


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
        names: Tasks and groups of tasks, with or without the prefix "lm_eval:".
        model: A causal language model of transformers. Its training mode is left as it was.
        tokenizer: The model's own.
        s: `harness_tasks`, `limit`, `batch_size` and `seed` count. The number of examples is the task's own.

    Raises:
        DataError: The harness does not know a task.
    """
    tasks = [name.removeprefix(PREFIX) for name in names]
    manager = _task_manager(tasks, s.harness_tasks)

    def ask() -> dict[str, dict[str, Any]]:
        found = _simple_evaluate(model, tokenizer, tasks, manager, s)["results"]
        return {f"{PREFIX}{task}": {"metrics": estimates(values)} for task, values in found.items()}

    return ask


def run_harness(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], s: EvalSettings) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns: `results` by task, `samples` with every log-likelihood, versions.

    Arguments and errors are those of `plan_harness`.
    """
    return _simple_evaluate(model, tokenizer, tasks, _task_manager(tasks, s.harness_tasks), s)


def estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    """The harness's values of a task, such as "acc,none", as `acc`, or `METRIC (FILTER)` where there is a filter."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        stderr = float(error) if isinstance(error, (int, float)) else math.nan  # "N/A" where it has none
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        found[name] = Estimate(float(value), stderr, int(values.get("sample_len", 0)))
    return found


def _mmlu(questions: Sequence[Question], model: PreTrainedModel, tokenizer: Any, s: EvalSettings) -> dict[str, Any]:
    subjects = {q.group: q.category for q in questions}
    tasks = [choices(subject, [q for q in questions if q.group == subject]) for subject in subjects]
    found, lm = _ask(tasks, _prompts(questions), model, tokenizer, s)
    accuracy = {subject: estimates(found["results"][subject])["acc"] for subject in subjects}
    responses = {subject: iter(_responses(found, subject)) for subject in subjects}

    def averages(chosen: Iterable[str]) -> dict[str, Estimate]:
        parts = [accuracy[subject] for subject in chosen]
        return {"micro": average(parts, by_size=True), "macro": average(parts)}

    members = {name: [subject for subject in subjects if subjects[subject] == name] for name in CATEGORIES}
    return {
        "metrics": averages(subjects),
        "truncated": sum(q.prompt in lm.truncated for q in questions),
        "predictions": [_predicted(next(responses[q.group]), q) for q in questions],
        "answers": [q.answer for q in questions],
        "categories": {name: averages(chosen) for name, chosen in members.items() if chosen},
        "subjects": accuracy,
    }


def _ask(
    tasks: Sequence[LocalTask], prompts: Mapping[str, Any], model: PreTrainedModel, tokenizer: Any, s: EvalSettings
) -> tuple[dict[str, Any], TrainedPromptLM]:
    """The harness's results and samples, and the model class that knows which prompts were truncated."""
    with evaluating(model):
        lm = TrainedPromptLM(model, tokenizer, prompts, s.batch_size, s.max_length)
        found: Any = lm_eval.evaluate(lm, {"tasks": {task.task_name: task for task in tasks}})
    return found, lm


def _documents(questions: Sequence[Question]) -> list[dict[str, Any]]:
    return [{"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer} for q in questions]


def _prompts(asked: Sequence[Question] | Sequence[WritingTask]) -> dict[str, Any]:
    return {q.prompt: q.framed or q.prompt for q in asked}


def _means(metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


def _generated(
    name: str, documents: list[dict[str, Any]], max_new_tokens: int, process: _Answer, metrics: Sequence[str]
) -> LocalTask:
    return LocalTask(
        name,
        documents,
        output_type="generate_until",
        generation_kwargs={"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        process_results=process,
        metric_list=_means(metrics),
    )


def _responses(found: Mapping[str, Any], task: str) -> list[list[Any]]:
    """What the model gave to each document of a task, in the order of the documents."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def _predicted(responses: Sequence[Any], question: Question) -> int | None:
    """Index of the choice that the model made."""
    if isinstance(responses[0], str):
        return find_option(responses[0], question.options)
    return likeliest([Score(*response) for response in responses])


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


def _simple_evaluate(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], manager: TaskManager, s: EvalSettings
) -> dict[str, Any]:
    with evaluating(model):
        lm = SharedPromptLM(model, tokenizer, s.batch_size, s.max_length)
        seeds = {f"{name}_random_seed": s.seed for name in ("numpy", "torch", "fewshot")}
        result: Any = lm_eval.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=s.limit, random_seed=s.seed, **seeds
        )
    assert result is not None  # None is for processes other than the first
    return result
