"""DPO by TRL's DPOTrainer with peft's LoRA: python -m benchmarks.jobs.peer_dpo SETTINGS.json"""

from __future__ import annotations

import sys
from typing import Any

from trl import DPOConfig, DPOTrainer

from benchmarks.jobs.trl_run import train


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What the job sets of TRL's arguments."""
    return {"max_length": job["max_length"], "beta": job["beta"]}


if __name__ == "__main__":
    train(sys.argv[1], DPOTrainer, DPOConfig, arguments)
