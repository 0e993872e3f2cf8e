"""Two nodes of one process each, as torchrun starts them: the same as one node of two, also after one was lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.lightning.tiny_task import assert_equal_bits

ROOT = Path(__file__).parents[2]
RECIPE = "configs/vision/smoke/nora_plus_plus.yaml"
FSDP = [
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    *("--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"),
    *("--trainer.strategy.save_distributed_checkpoint=false", "--trainer.strategy.process_group_backend=gloo"),
]
STRATEGIES = {"ddp": ["--trainer.strategy=ddp"], "fsdp": FSDP}
pytestmark = pytest.mark.slow


def free_port():
    with closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def train(folder, strategy, nodes, *arguments, restarts=0):
    """Train by torchrun on so many nodes, two processes in all; the last checkpoint, and what was printed.

    A node that is killed is started anew.
    """
    here = f"localhost:{free_port()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}"]
    launcher += [f"--max-restarts={restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint={here}", "--rdzv-id=1"]
    task = ["-m", "vision", "fit", f"--config={RECIPE}", "--ckpt_path=last", "--trainer.max_epochs=2"]
    task += [f"--trainer.num_nodes={nodes}", f"--trainer.devices={2 // nodes}", *STRATEGIES[strategy], *arguments]
    task += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.version=one"]
    # Restarted processes would meet in the store of the first ones, and torch 2.14 waits there for ever.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    logs = [folder / f"node{number}.txt" for number in range(nodes)]

    def start(number):
        # The first node holds what the nodes agree by; without it no other could go on.
        host = ["--rdzv-conf", f"is_host={number == 0},last_call_timeout=1"]
        command = [*launcher, *host, *task]
        with logs[number].open("a") as file:
            print("started", file=file, flush=True)
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | {"NODE": str(number)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    agents = [start(number) for number in range(nodes)]
    end = time.monotonic() + 300
    try:
        while any(agent.poll() is None for agent in agents):
            assert time.monotonic() < end, "\n".join(log.read_text() for log in logs)[-6000:]
            for number, agent in enumerate(agents):
                if agent.poll() == -signal.SIGKILL:
                    agents[number] = start(number)
            time.sleep(0.2)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    printed = "\n".join(log.read_text() for log in logs)
    assert [agent.returncode for agent in agents] == [0] * nodes, printed[-6000:]
    checkpoints = folder / "vision" / "smoke-nora_plus_plus" / "one" / "checkpoints"
    return torch.load(checkpoints / "last.ckpt", weights_only=True), printed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What two nodes learn by a strategy, trained when it is first asked for."""
    return cache(lambda strategy: train(tmp_path_factory.mktemp("nodes"), strategy, 2)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_learn_what_one_of_two_processes_does(uninterrupted, strategy, tmp_path):
    alone, _ = train(tmp_path, strategy, 1)
    assert uninterrupted(strategy)["global_step"] == alone["global_step"] == 6
    assert_equal_bits(uninterrupted(strategy)["state_dict"], alone["state_dict"])


KEEP = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.filename=last-step",
]
LOST = {"a process": "--trainer.callbacks.rank=1", "a node": "--trainer.callbacks.launcher=1"}


@pytest.mark.parametrize(("strategy", "lost"), zip(STRATEGIES, LOST, strict=True))
def test_what_is_killed_is_restarted_and_the_run_is_exact(uninterrupted, strategy, lost, tmp_path):
    kill = ["--trainer.callbacks+=tests.scale.stopping.Stopping", f"--trainer.callbacks.marker={tmp_path}/killed"]
    kill += ["--trainer.callbacks.step=5", "--trainer.callbacks.name=SIGKILL", LOST[lost]]
    again, printed = train(tmp_path, strategy, 2, *KEEP, *kill, restarts=2)
    assert len(list(tmp_path.glob("killed*"))) == 1
    assert (tmp_path / "node1.txt").read_text().count("started\n") == (2 if lost == "a node" else 1)
    assert "last-step" in printed  # resumed from
    assert_equal_bits(again["state_dict"], uninterrupted(strategy)["state_dict"])
