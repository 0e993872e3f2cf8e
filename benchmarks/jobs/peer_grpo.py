"""GRPO by TRL's GRPOTrainer with peft's LoRA: python -m benchmarks.jobs.peer_grpo SETTINGS.json"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.jobs.report import Report
from benchmarks.jobs.trainers import plain_arguments, reporting


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is the answer."""
    found = [re.findall(r"\d+", completion) for completion in completions]
    return [float(numbers[-1:] == [number]) for numbers, number in zip(found, answer, strict=True)]


def main() -> None:
    """Train and save the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    report.stage("model")
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    # Its batches count completions, ours questions.
    arguments = plain_arguments(job) | {"per_device_train_batch_size": job["batch_size"] * job["group_size"]}
    trainer = reporting(GRPOTrainer, report)(
        model=model,
        reward_funcs=right,
        args=GRPOConfig(
            **arguments,
            num_generations=job["group_size"],
            max_completion_length=job["max_new_tokens"],
            shuffle_dataset=False,
        ),
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
