"""Trainings beside one plain loader, loss and schedule, resumed after each of some batches: equal, bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler

import lit_adapters as la
from tests.lightning.resume.resumed import STEPS, compare, keyed_loader
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, loader, state


class SaveAfter(Callback):
    """Saves after these batches, counted over epochs, and keeps what each batch was trained with."""

    def __init__(self, folder, *batches):
        self.folder, self.batches, self.seen = folder, batches, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.optimizers[0].param_groups[0]["lr"], trainer.accumulate_grad_batches))

    def on_train_batch_end(self, trainer, module, *rest):
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if number in self.batches:
            trainer.save_checkpoint(self.path(number))

    def path(self, number):
        return self.folder / f"{number}.ckpt"


def resumed_equals_whole(folder, task, data, batches, *more, **settings):
    """`more` makes the further callbacks of a run."""
    settings = {"max_epochs": 2} | settings

    def run(ckpt=None, save=()):
        module, saving = task(), SaveAfter(folder, *save)
        callbacks = [la.AdapterCallback(figures=False), saving, *(make() for make in more)]
        fit(folder, module, *callbacks, data=data(), ckpt=ckpt, **settings)
        return state(module), saving

    want, saving = run(save=batches)
    for number in batches:
        found, again = run(saving.path(number))
        assert again.seen == saving.seen[number:], number
        assert_equal_bits(found, want)


def six_batches():
    return loader(22, shuffle=True)


def test_rates_that_follow_the_loss_of_each_batch(tmp_path):
    """Lightning updates them after the checkpoint, or after a validation that is due."""
    compare(tmp_path, keyed_loader, STEPS, "loss", val_check_interval=0.5)


@pytest.mark.slow
def test_rates_that_follow_the_loss_of_each_step(tmp_path):
    compare(tmp_path, keyed_loader, STEPS, "loss", accumulate_grad_batches=2)


class Pairs(Task):
    """Reads two loaders; the second may be exhausted."""

    def loss(self, batch):
        found = [super(Pairs, self).loss(batch[key]) for key in ("a", "b") if key in batch and batch[key] is not None]
        return sum(found) if isinstance(batch, dict) else super().loss(batch)


def resumable(n):
    dataset = loader(n).dataset
    return la.ResumableLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 1, 0, seed=0))


@pytest.mark.parametrize("make", [lambda n: loader(n, shuffle=True), resumable], ids=["plain", "resumable"])
@pytest.mark.parametrize(
    ("mode", "batches"), [("max_size_cycle", (1, 2, 4, 5, 8)), ("max_size", (2, 5, 8)), ("min_size", (1, 3))]
)
def test_loaders_of_different_lengths(tmp_path, make, mode, batches):
    """Six batches and two: the shorter loader is repeated, is exhausted, or ends the epoch."""
    resumed_equals_whole(
        tmp_path, Pairs, lambda: CombinedLoader({"a": make(22), "b": make(8)}, mode), batches, limit_val_batches=0
    )


class Iterating(Task):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=4)
        return loss


def test_a_step_that_takes_its_batches_itself(tmp_path):
    resumed_equals_whole(tmp_path, Iterating, six_batches, (2, 5, 8))


class Manual(Task):
    """The head steps with every batch, the adapters with every fourth."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        head, adapters = self.optimizers()
        self.manual_backward(self.loss(batch))
        head.step()
        head.zero_grad()
        if (batch_idx + 1) % 4 == 0:
            adapters.step()
            adapters.zero_grad()

    def configure_optimizers(self):
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if "head" in name]
        return [torch.optim.SGD(ps, 0.1) for ps in (head, [p for n, p in trained.items() if "head" not in n])]


def test_manual_optimisation_with_two_optimisers(tmp_path):
    resumed_equals_whole(tmp_path, Manual, six_batches, (3, 4, 6, 9))


def test_accumulation_by_a_schedule(tmp_path):
    def schedule():
        return GradientAccumulationScheduler({0: 1, 1: 3})

    resumed_equals_whole(tmp_path, Task, six_batches, (3, 6, 8, 9), schedule)


class WithoutNorm(Task):
    """Averaged weights need no pass over the data."""

    def __init__(self):
        super().__init__()
        self.net.norm = torch.nn.Identity()


def averaging():
    return StochasticWeightAveraging(1e-2, 1)


def test_weight_averaging(tmp_path):
    resumed_equals_whole(tmp_path, WithoutNorm, six_batches, (3, 6, 8, 15), averaging, max_epochs=3)


def test_weight_averaging_that_measures_batch_norms_is_refused(tmp_path):
    save = SaveAfter(tmp_path, 10, 14)
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), save, averaging(), data=six_batches(), max_epochs=2)
    resumed = Task()
    fit(
        tmp_path, resumed, la.AdapterCallback(figures=False), averaging(),
        data=six_batches(), ckpt=save.path(10), max_epochs=2,
    )  # fmt: skip
    with pytest.raises(la.AdapterError, match=r"14\.ckpt' was written while StochasticWeightAveraging measured"):
        fit(
            tmp_path, Task(), la.AdapterCallback(figures=False), averaging(),
            data=six_batches(), ckpt=save.path(14), max_epochs=2,
        )  # fmt: skip


def test_a_loader_begins_anew_after_a_fit_that_failed(tmp_path):
    """It was told where to go on, and the fit ended before its first batch."""

    class Failing(Callback):
        def on_train_start(self, trainer, module):
            raise RuntimeError("on purpose")

    data = DataLoader(loader(22).dataset, 4)
    save = SaveAfter(tmp_path, 3)
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), save, data=data)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Task(), la.AdapterCallback(figures=False), Failing(), data=data, ckpt=save.path(3))
    states = []
    for given in (data, DataLoader(loader(22).dataset, 4)):
        torch.manual_seed(0)
        task = Task()
        fit(tmp_path, task, la.AdapterCallback(figures=False), data=given)
        states.append(state(task))
    assert_equal_bits(*states)
