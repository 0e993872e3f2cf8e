"""Runs on this machine and on clusters: killed ones, stopped studies, repeats; results are the same everywhere."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lit_adapters.errors import AdapterError
from lit_adapters.study import running
from lit_adapters.study.attempt import Attempt, claim, exit_reason, repeats
from lit_adapters.study.executors import create_executor
from lit_adapters.study.executors.ray import _recorded
from lit_adapters.study.executors.slurm import SlurmExecutor
from lit_adapters.study.jobs import Job
from lit_adapters.study.running import run_study
from tests.study.studies import PROGRAM, write_study

ROOT = Path(__file__).parents[2]
NARROW = {"rates": {"optimizer.init_args.lr": 0.1}}
WIDE = {**NARROW, "set": {"model.width": 3}}

# Before the program: `first(name)` is true for one process of the study alone.
HEAD = """
import os, pathlib, signal, time
here = pathlib.Path(__file__).parent

def first(name):
    try:
        with (here / name).open("x") as file:
            file.write(f"{os.getpid()} {os.getppid()} ")
        return True
    except FileExistsError:
        return False
"""


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)
    return found


def pids(path):
    """The process that made a marker, and its parent."""
    wait_for(lambda: path.exists() and path.read_text().endswith(" "))
    return [int(pid) for pid in path.read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def outcome(results):
    """What must not depend on where a run was carried out."""
    kept = {}
    for record in results.records:
        values = {
            k: v for k, v in asdict(record).items() if k not in ("seconds", "peak_memory_mib", "environment", "ended")
        }
        kept[record.id] = (values, {name: array.tobytes() for name, array in results.items(record).items()})
    return kept


def on(study, executor, **options):
    return replace(study, run=replace(study.run, executor=executor, workers=2, options=options))


@pytest.fixture
def job_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    return folder


def test_an_attempt_says_that_a_folder_is_not_shared(tmp_path, job_folder):
    assert "share" in Attempt(str(tmp_path / "elsewhere"), str(tmp_path), "a", wait=0)()["problem"]
    owner = claim(str(job_folder))
    assert "share" in Attempt(str(job_folder), str(tmp_path / "elsewhere"), owner, wait=0)()["problem"]


def test_an_attempt_that_was_replaced_starts_nothing(tmp_path, job_folder):
    old = claim(str(job_folder))
    claim(str(job_folder))
    assert "started again" in Attempt(str(job_folder), str(tmp_path), old, wait=0)()["problem"]
    assert Attempt(str(job_folder), str(tmp_path), old).checkpoint() is None
    assert sorted(path.name for path in job_folder.iterdir()) == ["job.json", "owner.txt"]


def test_a_preempted_run_is_repeated_three_times(tmp_path, job_folder):
    pytest.importorskip("submitit")
    attempt = Attempt(str(job_folder), str(tmp_path), claim(str(job_folder)))
    for _ in range(3):
        (job_folder / "log.txt").touch()
        (job_folder / "half").mkdir()
        attempt = attempt.checkpoint().function
        attempt._clear()
        assert not (job_folder / "half").exists()
    assert repeats(str(job_folder)) == 3
    assert attempt.checkpoint() is None


def test_a_ray_that_has_crashed_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert _recorded() == "auto"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    assert _recorded() == "local"


def test_signals_are_named():
    assert "SIGKILL" in exit_reason(-signal.SIGKILL)
    assert "memory" in exit_reason(-signal.SIGKILL)
    assert "SIGSEGV" in exit_reason(-signal.SIGSEGV)
    assert exit_reason(1) == ""


@pytest.mark.parametrize(
    ("name", "options", "module", "words"),
    [
        ("ray", {"num_gpu": 1}, None, "run.options.num_gpu is unknown"),
        ("ray", {"resources": {"tpu": "two"}}, None, "run.options.resources is {'tpu': 'two'}"),
        ("ray", {}, "ray", "lit-adapters\\[cluster\\]"),
        ("slurm", {}, "submitit", "lit-adapters\\[cluster\\]"),
        ("slurm", {"cpus_per_task": 2}, None, "run.threads"),
    ],
)
def test_mistakes_are_told_before_anything_starts(name, options, module, words, monkeypatch):
    if module is not None:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AdapterError, match=words):
        create_executor(name, "program", options)


def start(line, **options):
    """Start a program that Ctrl-C stops, also where this process was started in the background and ignores it."""
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed, **options)


@pytest.mark.slow
def test_a_killed_run_a_stopped_and_a_killed_study(tmp_path):
    program = HEAD + 'if first("stopped") or first("killed"):\n    time.sleep(60)\n' + PROGRAM
    study = write_study(tmp_path, program, arms={"wide": WIDE}, search=None, contrasts=None)
    line = [sys.executable, "-m", "lit_adapters.cli", "study", "run", str(study.path)]
    started = start(line, start_new_session=True)
    run, server = pids(tmp_path / "stopped")
    with pytest.raises(AdapterError, match="another process"):
        run_study(study, study.folder)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    assert "goes on" in started.communicate(timeout=60)[1]
    assert started.returncode == 130
    wait_for(lambda: gone(run) and gone(server))

    started = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    run, server = pids(tmp_path / "killed")
    started.kill()
    started.wait()
    wait_for(lambda: gone(run) and gone(server))

    results = run_study(study, study.folder)
    assert len(results.records) == 2
    assert not list(study.folder.rglob("*.tmp*"))


@pytest.mark.slow
def test_a_run_out_of_memory_is_a_failure_that_names_the_signal(tmp_path):
    study = write_study(tmp_path, "import os\nprint('the last line', flush=True)\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(AdapterError, match="killed by SIGKILL") as failure:
        run_study(study, study.folder)
    assert "the last line" not in str(failure.value)


@pytest.mark.slow
def test_ray_repeats_what_was_killed_and_computes_the_same(tmp_path, monkeypatch):
    """A run kills itself, another one the process that waits for it, and a node dies with a run on it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = HEAD + (
        'if raylet := os.environ.get("RAY_RAYLET_PID"):\n'
        '    (here / f"node-{raylet}").touch()\n'
        '    if first("itself"):\n'
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        '    if first("parent"):\n'
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "        time.sleep(60)\n"
        '    if raylet == (here / "second").read_text() and first("node"):\n'
        "        time.sleep(60)\n"
    )
    study = write_study(tmp_path, head + PROGRAM, arms={"narrow": NARROW, "wide": WIDE}, search=None, contrasts=None)
    expected = outcome(run_study(on(study, "local"), tmp_path / "local"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        second = cluster.add_node(**small)
        raylet = second.all_processes["raylet"][0].process
        (tmp_path / "second").write_text(str(raylet.pid))
        hung = []

        def kill_node():
            hung.extend(pids(tmp_path / "node"))
            raylet.kill()
            raylet.wait()  # to Ray's processes a zombie is alive

        threading.Thread(target=kill_node, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        results = run_study(on(study, "ray"), tmp_path / "ray")
    finally:
        cluster.shutdown()
    assert outcome(results) == expected
    assert len(list(tmp_path.glob("node-*"))) == 2
    assert gone(hung[0])
    assert len(list((tmp_path / "ray").rglob("log.[123].txt"))) == 3


@pytest.mark.slow
def test_a_stopped_study_ends_its_tasks(tmp_path):
    pytest.importorskip("ray")
    program = HEAD + 'if first("stopped"):\n    time.sleep(300)\n' + PROGRAM
    study = write_study(tmp_path, program, arms={"wide": WIDE}, search=None, contrasts=None)
    line = [sys.executable, "-m", "lit_adapters.cli", "study", "run", str(study.path), "--executor", "ray"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = start(line, env=environment)
    run, task = pids(tmp_path / "stopped")
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=120)[1]
    assert "this machine alone" in said
    assert "goes on" in said
    assert started.returncode == 130
    wait_for(lambda: gone(run) and gone(task))


@pytest.mark.slow
def test_submitit_repeats_what_was_preempted_and_computes_the_same(tmp_path, monkeypatch):
    """There is no Slurm here: submitit's own jobs on this machine are sent what Slurm sends before a preemption."""
    pytest.importorskip("submitit")
    head = HEAD + 'if os.environ.get("SUBMITIT_EXECUTOR") and first("preempted"):\n    time.sleep(60)\n'
    study = write_study(tmp_path, head + PROGRAM, arms={"wide": WIDE}, search=None, contrasts=None)
    expected = outcome(run_study(on(study, "local"), tmp_path / "local"))
    monkeypatch.setattr(running, "create_executor", lambda *_: SlurmExecutor({"slurm_partition": "gpu"}, "local"))
    hung = []

    def preempt():
        hung.extend(pids(tmp_path / "preempted"))
        os.kill(hung[1], signal.SIGUSR2)

    threading.Thread(target=preempt, daemon=True).start()
    assert outcome(run_study(study, tmp_path / "slurm")) == expected
    assert gone(hung[0])
    assert len(list((tmp_path / "slurm").rglob("log.1.txt"))) == 1


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"no Ray cluster can be used at 127.0.0.1:9: .*refused; .*RAY_ADDRESS"):
        create_executor("ray", "program", {})
    pytest.importorskip("submitit")
    job = Job(tmp_path, 1)
    with pytest.raises(AdapterError, match=r"Slurm cannot be used: .*srun"):
        create_executor("slurm", "program", {}).submit(job)
    with pytest.raises(AdapterError, match=r"run.options: Unknown argument 'partitoin'"):
        SlurmExecutor({"slurm_partitoin": "gpu"}, "local").submit(job)
