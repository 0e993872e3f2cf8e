"""What a process that was killed while it saved has left is removed at the next start, and nothing else."""

import os
import subprocess
import sys
import time

import pytest

from lit_adapters import AdapterCallback
from lit_adapters.files import atomic
from tests.lightning.resume.test_checkpoints import saver
from tests.lightning.tiny_task import Task, fit

MACHINE = atomic._writer().partition("-")[0]


@pytest.fixture(scope="module")
def ended():
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def left(folder, name, age=0.0):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_at_the_start_of_a_run(tmp_path, ended):
    kept = tmp_path / "kept"
    ours = [left(folder, f".last.ckpt.{MACHINE}-{ended}.abcd_123") for folder in (kept, tmp_path)]
    fit(tmp_path, Task(), AdapterCallback(), saver(tmp_path))
    assert not [path for path in ours if path.exists()]
    resumed = left(kept, f".epoch=0-step=6.ckpt.{MACHINE}-{ended}.abcd_123")
    fit(tmp_path / "other", Task(), AdapterCallback(), ckpt=kept / "last.ckpt", max_epochs=2)
    assert not resumed.exists()
    assert (kept / "last.ckpt").exists()


def test_which_files(tmp_path, ended):
    day = 25 * 3600
    gone = [
        left(tmp_path, f".a.ckpt.{MACHINE}-{ended}.abcdefgh"),
        left(tmp_path, f".a.b.ckpt.{MACHINE}-{10**30}.abcdefgh"),
        left(tmp_path, f".a.ckpt.00000000-{os.getpid()}.abcdefgh", day),
        left(tmp_path, ".a.ckpt.abcdefgh", day),
    ]
    stay = [
        left(tmp_path, f".a.ckpt.{MACHINE}-{os.getpid()}.abcdefgh", day),
        left(tmp_path, f".a.ckpt.{MACHINE}-1.abcdefgh", day),
        left(tmp_path, ".a.ckpt.00000000-1.abcdefgh"),
        left(tmp_path, ".a.ckpt.abcdefgh"[:-1], day),
        left(tmp_path, ".a.ckpt.ABCDEFGH", day),
        left(tmp_path, "a.ckpt.abcdefgh", day),
        left(tmp_path, "a.ckpt", day),
        left(tmp_path, f".a.json.{MACHINE}-{ended}.abcdefgh", day),
    ]
    link = tmp_path / f".c.ckpt.{MACHINE}-{ended}.abcdefgh"
    link.symlink_to(stay[-1])
    (tmp_path / f".d.ckpt.{MACHINE}-{ended}.abcdefgh").mkdir()
    assert sorted(atomic.remove_leftovers(tmp_path, ".ckpt")) == sorted(gone)
    assert all(path.exists() for path in [*stay, link])
    assert atomic.remove_leftovers(tmp_path / "nowhere", ".ckpt") == []


def test_a_write_names_its_process(tmp_path):
    names = []
    atomic.write_atomically(tmp_path / "a.ckpt", lambda path: (names.append(path.name), path.write_bytes(b"1")))
    assert names[0].startswith(f".a.ckpt.{MACHINE}-{os.getpid()}.")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
