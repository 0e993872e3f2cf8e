"""examples/slurm/train.sh against a scheduler that is not there: stopped by its signal, requeued, and exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.lightning.tiny_task import assert_equal_bits

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sh"
RECIPE = "configs/vision/smoke/nora_plus_plus.yaml"
LIMIT = 240  # seconds
pytestmark = pytest.mark.slow


@pytest.fixture
def scheduler(tmp_path):
    """Commands that stand for Slurm's: srun runs a task, scontrol notes what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    # The tasks of a job, each with its number; the status is the highest.
    tasks = "for task in $(seq 0 $((SLURM_NTASKS - 1))); do\n"
    tasks += 'SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & started="$started $!"; done\n'
    tasks += 'for task in $started; do wait "$task"; ended=$?; [ $ended -gt ${status:-0} ] && status=$ended; done\n'
    tasks += "exit ${status:-0}"
    for name, text in {"srun": tasks, "scontrol": f'echo "$@" >> {tmp_path}/asked'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    def submit(job, *arguments, tasks=1):
        slurm = {"JOB_ID": job, "JOB_NAME": "x", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "JOB_NUM_NODES": 1}
        slurm |= {"NODEID": 0, "JOB_NODELIST": "localhost"}
        environment = os.environ | {f"SLURM_{key}": str(value) for key, value in slurm.items()}
        path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]  # `python` is this one
        environment |= {"PATH": ":".join(path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        save = f"--trainer.logger.init_args.save_dir={tmp_path}"
        command = [str(SCRIPT), "vision", RECIPE, save, "--trainer.max_epochs=2", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)

    return submit


def test_a_job_is_requeued_and_ends_as_an_uninterrupted_one(scheduler, tmp_path):
    whole = scheduler(1)
    assert not whole.returncode, whole.stderr
    stop = ["--trainer.callbacks+=tests.scale.stopping.Stopping", f"--trainer.callbacks.marker={tmp_path}/stopped"]
    stop += ["--trainer.callbacks.step=3", "--trainer.callbacks.name=SIGTERM"]
    first = scheduler(2, *stop)
    assert not first.returncode, first.stderr
    assert (tmp_path / "asked").read_text() == "requeue 2\n"
    folder = tmp_path / "vision" / "smoke-nora_plus_plus"
    assert [p.name for p in (folder / "slurm-2" / "checkpoints").iterdir()] == ["last-interrupted.ckpt"]
    second = scheduler(2, *stop)
    assert not second.returncode, second.stderr
    assert (tmp_path / "asked").read_text() == "requeue 2\n"  # not again
    ends = [torch.load(folder / f"slurm-{job}" / "checkpoints" / "last.ckpt", weights_only=True) for job in (1, 2)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 10
    assert_equal_bits(ends[0]["state_dict"], ends[1]["state_dict"])


def test_a_job_of_two_tasks_stops_together(scheduler, tmp_path):
    """Wherever SIGTERM arrives: the tasks finish the same batch and write one checkpoint."""
    whole = scheduler(2, "--trainer.strategy=ddp", tasks=2)
    assert not whole.returncode, whole.stderr
    folder = tmp_path / "vision" / "smoke-nora_plus_plus"
    uninterrupted = torch.load(folder / "slurm-2" / "checkpoints" / "last.ckpt", weights_only=True)
    for signalled in (0, 1):
        stop = ["--trainer.callbacks+=tests.scale.stopping.Stopping"]
        stop += [f"--trainer.callbacks.marker={tmp_path}/stopped-{signalled}"]
        stop += ["--trainer.callbacks.step=2", "--trainer.callbacks.name=SIGTERM"]
        stop += ["--trainer.strategy=ddp", f"--trainer.callbacks.rank={signalled}"]
        first = scheduler(signalled, *stop, tasks=2)
        assert not first.returncode, first.stderr
        assert (tmp_path / "asked").read_text().splitlines()[signalled:] == [f"requeue {signalled}"]
        checkpoints = folder / f"slurm-{signalled}" / "checkpoints"
        assert "stopped by SIGTERM after step 3" in first.stdout + first.stderr
        assert [path.name for path in checkpoints.glob("*interrupted*")] == ["last-interrupted.ckpt"]
        second = scheduler(signalled, *stop, tasks=2)
        assert not second.returncode, second.stderr
        goes_on = torch.load(checkpoints / "last.ckpt", weights_only=True)
        assert goes_on["global_step"] == uninterrupted["global_step"]
        assert_equal_bits(goes_on["state_dict"], uninterrupted["state_dict"])


def test_a_job_that_fails_is_not_requeued(scheduler, tmp_path):
    failed = scheduler(3, "--model.num_classes=1")
    assert failed.returncode == 1
    assert "num_classes=1 must be at least 2" in failed.stderr
    assert not (tmp_path / "asked").exists()
