"""A training by one of TRL's trainers with peft's LoRA, from the model to the saved adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.jobs.report import Report
from benchmarks.jobs.trainers import plain_arguments, reporting


def train(
    job_file: str, trainer: type, config: type, arguments: Callable[[dict[str, Any]], dict[str, Any]], **more: Any
) -> None:
    """Train on the rows of a job, save the adapter, and write the report.

    Args:
        job_file: JSON with the settings of the job.
        trainer: TRL's trainer.
        config: The class of its arguments.
        arguments: Its arguments of a job, beside or in place of those of `plain_arguments`.
        more: Further arguments of the trainer itself.
    """
    job = json.loads(Path(job_file).read_text())
    report = Report(job["report"])
    report.stage("start-up")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    report.stage("model")
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    built = reporting(trainer, report)(
        model=model,
        args=config(**plain_arguments(job) | arguments(job)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"]),
        **more,
    )
    report.stage("data")
    built.train()
    built.save_model(job["out"])
    report.write()
