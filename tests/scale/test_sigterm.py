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


def train(folder, *arguments):
    """Train in two processes; what ended, and where the checkpoints are."""
    command = [sys.executable, "-m", "vision", "fit", f"--config={RECIPE}", "--trainer.max_epochs=2"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.logger.init_args.save_dir={folder}"]
    command += ["--trainer.logger.init_args.version=run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    return run, folder / "vision" / "smoke-nora_plus_plus" / "run" / "checkpoints"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last checkpoint of a run that nothing stopped."""
    whole, checkpoints = train(tmp_path_factory.mktemp("whole"))
    assert not whole.returncode, whole.stderr
    return torch.load(checkpoints / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("step", [1, 2])
def test_sigterm_for_the_first_process_stops_all(uninterrupted, step, tmp_path):
    """In mid-epoch, and after the last batch of an epoch, whose validation is finished first."""
    stop = ["--trainer.callbacks+=tests.scale.stopping.Stopping", f"--trainer.callbacks.marker={tmp_path}/stopped"]
    stop += [f"--trainer.callbacks.step={step}", "--trainer.callbacks.name=SIGTERM"]
    stop += ["--trainer.callbacks.rank=0"]
    first, checkpoints = train(tmp_path, *stop)
    assert first.returncode == 143, first.stderr
    # The signal comes after the processes have told each other, so one more batch is trained.
    assert f"stopped by SIGTERM after step {step + 1}" in first.stdout + first.stderr
    assert ("val/acc1" in first.stdout) == (step == 2)
    assert [path.name for path in checkpoints.glob("*interrupted*")] == ["last-interrupted.ckpt"]
    second, _ = train(tmp_path, *stop, f"--ckpt_path={checkpoints / 'last-interrupted.ckpt'}")
    assert not second.returncode, second.stderr
    goes_on = torch.load(checkpoints / "last.ckpt", weights_only=True)
    assert goes_on["global_step"] == uninterrupted["global_step"]
    assert_equal_bits(goes_on["state_dict"], uninterrupted["state_dict"])
