"""MMLU questions: `python -m language.evaluate` beside lm-evaluation-harness with its own model class, HFLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from benchmarks.jobs.job import Data, Job, SizeName, script_side
from benchmarks.jobs.models import language_model
from benchmarks.jobs.process import Side
from benchmarks.jobs.text import read_rows, write_rows
from language.evaluate.mmlu import read_mmlu
from language.evaluate.prompts import PromptEncoder
from language.evaluate.settings import EvalSettings

TASK = "asked_questions"
_SETTINGS = {
    "tiny": {"subjects": 2, "per_subject": 4, "shots": 1, "batch_size": 2, "max_length": 2048},
    "real": {"subjects": 4, "per_subject": 8, "shots": 5, "batch_size": 8, "max_length": 2048},
}


def mmlu(size: SizeName, data: Data, work: Path) -> Job:
    """The harness is asked the very prompts of our command, from a task in YAML; it chooses among the same letters.

    Its index of thousands of tasks, which its command line reads first, is left out.
    """
    settings = _SETTINGS[size]
    model = language_model(size, work)
    folder = work / "mmlu"
    folder.mkdir(exist_ok=True)
    for split, rows in _rows(size, data, settings).items():
        write_rows(folder / f"{split}.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = read_mmlu(folder, tokenizer, EvalSettings(shots=settings["shots"]))
    asked = [{"prompt": q.prompt.text, "choices": list(q.choices), "answer": q.right} for q in questions]
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_rows(work / "mmlu_asked.jsonl", asked))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    tasks = work / "mmlu_tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "task.yaml").write_text(yaml.safe_dump(task))
    ours = Side("language.evaluate", [], work / "mmlu_ours", read=lambda side: _counted(side, questions, tokenizer))
    arguments = [
        f"--model={model}",
        "--tasks=mmlu",
        f"--mmlu={folder}",
        *(f"--{name}={settings[name]}" for name in ("shots", "batch_size", "max_length")),
        f"--out={ours.report}",
    ]
    files = {"model": str(model), "tasks": str(tasks), "task": TASK}
    return Job(
        "mmlu",
        "lm-eval",
        "questions",
        settings,
        replace(ours, arguments=arguments),
        script_side("peer_mmlu", settings | files, work / "mmlu_peer", saves=None),
    )


def _rows(size: SizeName, data: Data, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the first subjects: all examples, and as many questions of each as are asked."""
    if size == "tiny":
        found = {"dev": _made(settings, "Example"), "test": _made(settings, "Question")}
    elif data.mmlu is None:
        raise SystemExit("error: this job needs --mmlu, a folder with dev.jsonl and test.jsonl")
    else:
        found = {split: read_rows(data.mmlu / f"{split}.jsonl") for split in ("dev", "test")}
    subjects = list(dict.fromkeys(row["subject"] for row in found["test"]))[: settings["subjects"]]
    of = {split: {s: [row for row in rows if row["subject"] == s] for s in subjects} for split, rows in found.items()}
    return {
        "dev": [row for rows in of["dev"].values() for row in rows],
        "test": [row for rows in of["test"].values() for row in rows[: settings["per_subject"]]],
    }


def _made(settings: dict[str, Any], word: str) -> list[dict[str, Any]]:
    subjects = ["abstract_algebra", "anatomy"]
    return [
        {
            "subject": subject,
            "question": f"{word} {number} on {subject}: which is largest?",
            "choices": [str(number + i * i) for i in range(4)],
            "answer": number % 4,
        }
        for subject in subjects
        for number in range(settings["per_subject"])
    ]


def _counted(side: Side, questions: list[Any], tokenizer: Any) -> dict[str, Any]:
    """What our command has written, as a report.

    It counts no tokens: those of the prompts are counted as it makes them. It writes its file when it has asked, and
    says how long that took.
    """
    content = json.loads(side.report.read_text())
    written, end = content["results"]["mmlu"], side.report.stat().st_mtime
    encoder = PromptEncoder(tokenizer, None)
    tokens = sum(len(encoder.question(q.prompt, q.choices).context) for q in questions)
    counts = {"questions": len(written["answers"]), "tokens": tokens}
    stages = {"start-up and model": end - content["seconds"], "asking": end}
    return {"stages": stages, "steps": [], "counts": counts, "answers": written["answers"]}
