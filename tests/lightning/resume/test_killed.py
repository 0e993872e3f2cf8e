"""`python -m vision|language fit`, killed and resumed several times, against the uninterrupted run: bit for bit."""

import multiprocessing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

from lit_adapters.files.adapters import RECORD
from lit_adapters.lightning.resume.callback import INTERRUPTED, TERMINATED
from tests.lightning.resume.killed import KILL, TERMINATE, train

OPTIONS = [
    "--trainer.max_epochs=2",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=2",
    "--model.adapters.dropout=0.3",
    "--model.adapters.schedule.init_args.end=0.9",
]


def process(*arguments):
    """Exit status of a run in a process that is forked from one with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.lightning.resume.killed"])
    child = context.Process(target=train, args=arguments)
    child.start()
    child.join(120)
    return child.exitcode


def scalars(folder):
    """All records of all event files: (tag, step) to value; records of the same moment must agree."""
    found = {}
    for path in sorted(folder.rglob("events.out.*"), key=lambda p: p.stat().st_mtime):
        board = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in board.Tags()["scalars"]:
            for record in board.Scalars(tag):
                assert found.setdefault((tag, record.step), record.value) == record.value, (tag, record.step)
    return found


def assert_equal_trees(first, second):
    (leaves, spec), (others, other_spec) = tree_flatten(first), tree_flatten(second)
    assert spec == other_spec
    for one, other in zip(leaves, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.slow
@pytest.mark.parametrize("app", ["vision", "language"])
def test_killed_and_resumed(app, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert process(app, whole, OPTIONS) == 0
    workers, step = "--data.num_workers=2", killed / "kept" / "step.ckpt"
    assert process(app, killed, OPTIONS, KILL, 3) == -KILL
    assert process(app, killed, [*OPTIONS, workers, f"--ckpt_path={step}"], TERMINATE, 6) == TERMINATED
    (interrupted,) = killed.rglob(INTERRUPTED)
    assert process(app, killed, [*OPTIONS, f"--ckpt_path={interrupted}"]) == 0

    first, second = (torch.load(p / "end.ckpt", weights_only=True) for p in (whole, killed))
    betas = {k: v for k, v in torch.load(interrupted, weights_only=True)["state_dict"].items() if k.endswith(".beta")}
    assert betas
    assert all(0 < beta < 1 for beta in betas.values())
    for key in ("state_dict", "optimizer_states", "lr_schedulers", RECORD):
        assert_equal_trees(first[key], second[key])
    want = scalars(whole)
    assert {tag for tag, _ in want} >= {"train/loss", "val/loss", "adapter/beta"}
    assert scalars(killed) == want
