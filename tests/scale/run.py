"""Run by torchrun in two processes: all that test_two_processes.py reads, in one start; the argument is where."""

import sys
from pathlib import Path

import torch

from tests.scale import ddp_run, fsdp_run

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {"ddp": ddp_run.main(folder / "ddp"), "fsdp": fsdp_run.main(folder / "fsdp")}
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
