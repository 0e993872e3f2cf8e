"""Generation with peft's adapter: python -m benchmarks.jobs.peer_generation SETTINGS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.jobs.continuing import continue_prompts
from benchmarks.jobs.report import Report


def main() -> None:
    """Load the model and the adapter, merge it if asked to, and continue the prompts."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    report.stage("model")
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    if job["merge"]:
        model = model.merge_and_unload()
    report.stage("adapter")
    continue_prompts(model, tokenizer, job, report)
    report.write()


if __name__ == "__main__":
    main()
