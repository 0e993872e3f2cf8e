"""Starts a module of the tests in two processes, as a user would with torchrun, and never waits for a deadlock."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_in_two(module: str, folder: Path, timeout: float = 240) -> list[dict[str, Any]]:
    """What the two processes of `module` saved as rank0.pt and rank1.pt in `folder`, which is its argument."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    run([*launcher, module, str(folder)], timeout)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def run(command: list[str], timeout: float = 240) -> str:
    """The output of a command that ends well, and in time; on one core for each process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            output, _ = process.communicate()
            raise AssertionError(f"no end after {timeout} s, a deadlock?\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output
