"""A run resumed from any of its checkpoints does what the uninterrupted one did from there on, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.files.adapters import RECORD
from tests.lightning.resume.resumed import STEPS, Noisy, compare, keyed_loader, run
from tests.lightning.resume.test_checkpoints import saver
from tests.lightning.tiny_task import Task, assert_equal_bits, events, fit, nora, state, trainer

WITHOUT_END = {"max_steps": 13, "max_epochs": -1}


def test_in_mid_epoch(tmp_path):
    """While AFA anneals, with gradient accumulation, dropout, all random states, and validation in between."""
    compare(tmp_path, keyed_loader, STEPS, accumulate_grad_batches=2, val_check_interval=0.5)


CASES = {
    "each step": (STEPS, "step", {}),
    "accumulation that does not divide the epoch": (STEPS, "step", {"accumulate_grad_batches": 4}),
    "validation within accumulation": (STEPS, "step", {"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "no validation": (STEPS, "step", {"limit_val_batches": 0}),
    "validation every second epoch": (STEPS, "step", {"check_val_every_n_epoch": 2, "max_epochs": 3}),
    "saved by validations": ({}, "step", {"val_check_interval": 0.5}),
    "saved by the last validation": ({"save_on_train_epoch_end": False}, "step", {}),
    "limited batches": (STEPS, "step", {"limit_train_batches": 4}),
    "max_steps": (STEPS, "step", WITHOUT_END),
    "max_steps, by epochs": ({}, "step", WITHOUT_END),
    "validation across epochs": (
        STEPS,
        "step",
        {**WITHOUT_END, "val_check_interval": 4, "check_val_every_n_epoch": None},
    ),
    "rates that follow the validation": (STEPS, "plateau", {"max_epochs": 3}),
    "rates that follow epochs": (STEPS, "epoch", {}),
    "loaders made anew": (STEPS, "step", {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_from_checkpoints_of_all_kinds(tmp_path, case):
    when, schedule, settings = CASES[case]
    every = 3 if when is STEPS and case != "each step" else 1
    compare(tmp_path, keyed_loader, when, schedule, every, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(tmp_path, persistent):
    def data():
        return keyed_loader(num_workers=2, persistent_workers=persistent)

    compare(tmp_path, data, STEPS, every=4)


def rows():
    x = torch.randn(22, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(22) % 3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plain_loader_at_the_end_of_an_epoch(tmp_path, workers):
    """Its order, and the seeds of its workers, come from the global random state."""
    compare(tmp_path, lambda: DataLoader(rows(), batch_size=4, shuffle=True, num_workers=workers), {}, max_epochs=3)


def test_a_plain_dataset_in_mid_epoch(tmp_path):
    def data():
        dataset = rows()
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=0)
        return la.ResumableLoader(dataset, batch_size=4, sampler=sampler)

    compare(tmp_path, data, {"every_n_train_steps": 4})


def test_open_gradients_are_kept(tmp_path):
    """A checkpoint between two optimiser steps, as a time interval or SIGTERM makes them."""

    class Between(la.AdapterCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if (trainer.current_epoch, batch_idx) == (1, 2):
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    settings = {"max_epochs": 3, "accumulate_grad_batches": 4}
    whole, resumed = Noisy(), Noisy()
    fit(tmp_path, whole, Between(), data=keyed_loader(), **settings)
    held = torch.load(tmp_path / "between.ckpt", weights_only=True)[RECORD]["processes"][0]["gradients"]
    assert held.keys() == {n for n, p in whole.named_parameters() if p.requires_grad}
    fit(tmp_path, resumed, Between(), data=keyed_loader(), ckpt=tmp_path / "between.ckpt", **settings)
    assert_equal_bits(state(resumed), state(whole))


def test_no_gradients_after_a_step(tmp_path):
    *_, checkpoints = run(tmp_path, keyed_loader(), STEPS)
    held = [torch.load(p, weights_only=True)[RECORD]["processes"][0]["gradients"] for p in checkpoints.moments]
    assert held == [{}] * 6


@pytest.fixture
def written(tmp_path):
    fit(tmp_path, Task(), AdapterCallback(), saver(tmp_path))
    return tmp_path / "kept" / "last.ckpt"


def refused(path, task, words, stage="fit"):
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    running = trainer(path.parent, AdapterCallback(), saver(path.parent.parent))
    with pytest.raises(AdapterError, match=words):
        running.fit(task, keyed_loader(), ckpt_path=path) if stage == "fit" else running.validate(
            task, keyed_loader(), ckpt_path=path
        )
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


class Other(Task):
    pass


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (lambda: Task([nora(), la.LoRA(rank=3, alpha=4.0)]), r"with LoRA\(rank=2\), the model has LoRA\(rank=3\)"),
        (lambda: Task([nora(groups=2), la.LoRA(rank=2, alpha=4.0)]), r"NoRA\(groups=4\), .* NoRA\(groups=2\)"),
        (lambda: Task(la.DoRA(rank=2)), "trained with NoRA and LoRA, the model has DoRA"),
        (lambda: Task(train=("head", "norm")), r"train=\['head'\], the model has train=\['head', 'norm'\]"),
        (Other, r"a checkpoint of .*\.Task, the model is a .*\.Other"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_checkpoints_of_another_run_are_refused(written, task, words, stage):
    refused(written, task(), words, stage)


def test_foreign_newer_and_torn_checkpoints_are_refused(written):
    whole = torch.load(written, weights_only=True)
    for name, changed, words in (
        (
            "foreign",
            {k: v for k, v in whole.items() if k not in (RECORD, "callbacks")},
            "was not written by a run with",
        ),
        ("newer", {**whole, RECORD: {**whole[RECORD], "format": 2}}, "has format 2, written by .* reads up to 1"),
    ):
        path = written.with_name(f"{name}.ckpt")
        torch.save(changed, path)
        refused(path, Task(), words)
    for size in (0, 100, written.stat().st_size // 2, written.stat().st_size - 10):
        path = written.with_name("torn.ckpt")
        path.write_bytes(written.read_bytes()[:size])
        refused(path, Task(), "is torn or not a checkpoint")


def test_a_foreign_checkpoint_may_be_validated(tmp_path):
    fit(tmp_path, Task(), saver(tmp_path))
    path = tmp_path / "kept" / "last.ckpt"
    assert trainer(tmp_path, AdapterCallback()).validate(Task(), keyed_loader(), ckpt_path=path, verbose=False)


def test_a_write_that_fails_leaves_the_old_checkpoint(written, monkeypatch):
    before = written.read_bytes()
    save = torch.save

    def half(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if "last" in str(file):
            with open(file, "rb+") as opened:
                opened.truncate(500)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(AdapterError, match=r"last-v1\.ckpt could not be written .the disk is full.*nothing was lost"):
        fit(written.parent.parent, Task(), AdapterCallback(), saver(written.parent.parent))
    assert written.read_bytes() == before
    assert not list(written.parent.glob(".*"))


def test_random_states_of_another_number_of_processes(written):
    content = torch.load(written, weights_only=True)
    content[RECORD]["processes"] *= 2
    torch.save(content, written)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        fit(written.parent.parent, Task(), AdapterCallback(), ckpt=written, max_epochs=2)


class Mean(Noisy):
    """Logs a mean over the epoch, too, and has a hyperparameter, without which loggers keep no final values."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 8})

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/mean", loss["loss"] if isinstance(loss, dict) else loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("when", [{}, STEPS])
@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 12}, WITHOUT_END])
def test_a_run_that_had_ended_is_finished(tmp_path, limit, when):
    """Killed right after its last checkpoint, it still gets its last records and its final values."""
    last = ModelCheckpoint(tmp_path / "kept", save_last=True, save_top_k=-1, **when)
    boards = [TensorBoardLogger(tmp_path, name, "", default_hp_metric=False) for name in ("whole", "resumed")]
    fit(tmp_path, Mean(), AdapterCallback(figures=False), last, data=keyed_loader(), logger=boards[0], **limit)
    ckpt = tmp_path / "kept" / "last.ckpt"
    fit(tmp_path, Mean(), AdapterCallback(figures=False), data=keyed_loader(), logger=boards[1], ckpt=ckpt, **limit)
    whole, resumed = (events(tmp_path / board.name) for board in boards)
    final = {tag: whole.Scalars(tag)[-1].value for tag in whole.Tags()["scalars"] if tag.startswith("final/")}
    assert {"final/train/loss", "final/val/loss", "final/train/mean"} <= final.keys()
    if when:  # the mean over an epoch is that of the batches since the checkpoint
        del final["final/train/mean"]
    else:
        assert resumed.Scalars("train/mean")[-1].value == whole.Scalars("train/mean")[-1].value
    assert {tag: resumed.Scalars(tag)[-1].value for tag in final} == final
