"""DPO by TRL's DPOTrainer with peft's LoRA: python -m benchmarks.jobs.peer_dpo SETTINGS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.jobs.report import Report
from benchmarks.jobs.trainers import plain_arguments, reporting


def main() -> None:
    """Train and save the adapter; the reference is the model without it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    report.stage("model")
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    trainer = reporting(DPOTrainer, report)(
        model=model,
        args=DPOConfig(**plain_arguments(job), max_length=job["max_length"], beta=job["beta"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"]),
    )
    report.stage("data")
    trainer.train()
    trainer.save_model(job["out"])
    report.write()


if __name__ == "__main__":
    main()
