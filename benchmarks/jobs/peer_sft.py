"""SFT by TRL's SFTTrainer with peft's LoRA: python -m benchmarks.jobs.peer_sft SETTINGS.json"""

from __future__ import annotations

import sys
from typing import Any

from trl import SFTConfig, SFTTrainer

from benchmarks.jobs.trl_run import train


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What the job sets of TRL's arguments."""
    one_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": job["batch_size"]}
    return {"max_length": job["max_length"], "packing": job["packing"]} | (one_row if job["packing"] else {})


if __name__ == "__main__":
    train(sys.argv[1], SFTTrainer, SFTConfig, arguments)
