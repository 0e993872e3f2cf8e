"""DDP in transformers' Trainer: two processes with half the batch learn what one learns with the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "ddp_run.py"


def run(out, rows, *launcher):
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, SCRIPT, out, str(rows)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out / "result.pt")


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path):
    one = run(tmp_path / "one", 4)
    two = run(tmp_path / "two", 2, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    for name, value in one["values"].items():
        torch.testing.assert_close(two["values"][name], value, rtol=1e-3, atol=2e-4)
    betas = [[e["adapter/beta"] for e in r["history"] if "adapter/beta" in e] for r in (one, two)]
    assert betas[0] == betas[1]
    assert betas[0][0] == 1.0
    assert betas[0][-1] == 0.0
    files = [load_file(tmp_path / kind / "checkpoint-6" / "model.safetensors") for kind in ("one", "two")]
    assert files[0].keys() == files[1].keys()
