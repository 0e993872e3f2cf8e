"""Two processes that Lightning starts: SIGTERM for the first ends both, with a checkpoint from which they go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lightning.tiny_task import assert_equal_bits

ROOT = Path(__file__).parents[2]
RECIPE = "configs/vision/smoke/nora_plus_plus.yaml"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", [1, 2])
def test_sigterm_for_the_first_process_stops_all(step, tmp_path):
    """In mid-epoch, and after the last batch of an epoch, whose validation is finished first."""

    def train(version, *arguments):
        command = [sys.executable, "-m", "vision", "fit", f"--config={RECIPE}", "--trainer.max_epochs=2"]
        command += ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.logger.init_args.save_dir={tmp_path}"]
        command += [f"--trainer.logger.init_args.version={version}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        checkpoints = tmp_path / "vision" / "smoke-nora_plus_plus" / version / "checkpoints"
        return run, checkpoints

    whole, uninterrupted = train("whole")
    assert not whole.returncode, whole.stderr
    stop = ["--trainer.callbacks+=tests.scale.stopping.Stopping", f"--trainer.callbacks.marker={tmp_path}/stopped"]
    stop += [f"--trainer.callbacks.step={step}", "--trainer.callbacks.name=SIGTERM"]
    stop += ["--trainer.callbacks.rank=0"]
    first, checkpoints = train("parts", *stop)
    assert first.returncode == 143, first.stderr
    # The signal comes after the processes have told each other, so one more batch is trained.
    assert f"stopped by SIGTERM after step {step + 1}" in first.stdout + first.stderr
    assert ("val/acc1" in first.stdout) == (step == 2)
    assert [path.name for path in checkpoints.glob("*interrupted*")] == ["last-interrupted.ckpt"]
    second, _ = train("parts", *stop, f"--ckpt_path={checkpoints / 'last-interrupted.ckpt'}")
    assert not second.returncode, second.stderr
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (uninterrupted, checkpoints)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert_equal_bits(ends[0]["state_dict"], ends[1]["state_dict"])
