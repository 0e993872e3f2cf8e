"""GRPO by TRL's GRPOTrainer with peft's LoRA: python -m benchmarks.jobs.peer_grpo SETTINGS.json"""

from __future__ import annotations

import re
import sys
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from benchmarks.jobs.trl_run import train


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is the answer."""
    found = [re.findall(r"\d+", completion) for completion in completions]
    return [float(numbers[-1:] == [number]) for numbers, number in zip(found, answer, strict=True)]


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What the job sets of TRL's arguments."""
    return {
        "per_device_train_batch_size": job["batch_size"]
        * job["group_size"],  # completions, where ours counts questions
        "num_generations": job["group_size"],
        "max_completion_length": job["max_new_tokens"],
        "shuffle_dataset": False,
    }


if __name__ == "__main__":
    train(sys.argv[1], GRPOTrainer, GRPOConfig, arguments, reward_funcs=right)
