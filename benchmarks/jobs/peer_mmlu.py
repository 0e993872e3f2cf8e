"""Questions asked by lm-evaluation-harness with HFLM: python -m benchmarks.jobs.peer_mmlu SETTINGS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.jobs.report import Report


def main() -> None:
    """Ask, and report what was answered."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    model = HFLM(
        pretrained=job["model"],
        dtype="float32",
        device="cpu",
        batch_size=job["batch_size"],
        max_length=job["max_length"],
    )
    report.stage("model")
    # `simple_evaluate` would also run commands to describe the machine, which takes seconds.
    tasks = TaskManager(include_path=job["tasks"], include_defaults=False).load([job["task"]])
    found = lm_eval.evaluate(model, tasks)
    report.stage("asking")
    samples = found["samples"][job["task"]]
    report.count(questions=len(samples), tokens=sum(len(model.tok_encode(s["doc"]["prompt"])) for s in samples))
    likelihoods = [[float(score[0]) for score in sample["filtered_resps"]] for sample in samples]
    chosen = [scores.index(max(scores)) for scores in likelihoods]
    order = sorted(range(len(samples)), key=lambda i: samples[i]["doc_id"])
    report.answers = [samples[i]["doc"]["choices"][chosen[i]] for i in order]
    report.write()


if __name__ == "__main__":
    main()
