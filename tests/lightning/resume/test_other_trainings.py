"""Trainings beside one plain loader, loss and schedule, resumed after each of some batches: equal, bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import SWALR
from torch.utils.data import DistributedSampler

import lit_adapters as la
from tests.lightning.resume.resumed import STEPS, Diary, compare, keyed_loader
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
    """From each checkpoint of the whole run, and from those of runs that were resumed; `more` makes more callbacks."""
    settings = {"max_epochs": 2} | settings

    def run(ckpt=None, save=()):
        module, saving = task(), SaveAfter(folder, *save)
        callbacks = [la.AdapterCallback(figures=False), saving, *(make() for make in more)]
        fit(folder, module, *callbacks, data=data(), ckpt=ckpt, **settings)
        return state(module), saving

    want, saving = run(save=batches)
    again = [run(saving.path(number)) for number in batches]
    # A chain: each run is resumed from what the one before it, itself resumed, has saved.
    chain = [run(saving.path(number), batches[i + 1 : i + 2]) for i, number in enumerate(batches)]
    for number, (found, seen) in [*zip(batches, again, strict=True), *zip(batches, chain, strict=True)]:
        assert seen.seen == saving.seen[number:], number
        assert_equal_bits(found, want)


VALIDATING = pytest.param({"val_check_interval": 2}, marks=pytest.mark.slow)


def six_batches():
    return loader(22, shuffle=True)


def test_rates_that_follow_the_loss_of_each_batch(tmp_path):
    """Lightning updates them after the checkpoint, or after a validation that is due."""
    compare(tmp_path, keyed_loader, STEPS, "loss", val_check_interval=0.5)


@pytest.mark.slow
def test_rates_that_follow_the_loss_of_each_step(tmp_path):
    compare(tmp_path, keyed_loader, STEPS, "loss", accumulate_grad_batches=2)


def test_rates_that_follow_a_validation_in_which_the_run_is_stopped(tmp_path):
    """SIGTERM comes in the validation, which ends, and the schedule steps before the checkpoint is written."""

    class Following(Task):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            rates = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.3)
            following = {"scheduler": rates, "monitor": "val/loss", "interval": "step", "frequency": 3}
            return {"optimizer": optimizer, "lr_scheduler": following}

    class Stopping(Callback):
        def on_validation_end(self, trainer, module):
            if trainer.global_step == 3 and not trainer.sanity_checking:
                trainer._signal_connector.received_sigterm = True

    settings = {"val_check_interval": 3, "max_epochs": 2}
    whole, resumed, save = Following(), Following(), SaveAfter(tmp_path)
    fit(tmp_path, whole, la.AdapterCallback(figures=False), save, data=six_batches(), **settings)
    with pytest.raises(SystemExit):
        fit(tmp_path, Following(), la.AdapterCallback(figures=False), Stopping(), data=six_batches(), **settings)
    again, ckpt = SaveAfter(tmp_path), tmp_path / "last-interrupted.ckpt"
    fit(tmp_path, resumed, la.AdapterCallback(figures=False), again, data=six_batches(), ckpt=ckpt, **settings)
    assert again.seen == save.seen[3:]
    assert len({rate for rate, _ in save.seen}) > 2
    assert_equal_bits(state(resumed), state(whole))


class Pairs(Task):
    """Reads two loaders; the second may be exhausted."""

    def loss(self, batch):
        found = [super(Pairs, self).loss(batch[key]) for key in ("a", "b") if key in batch and batch[key] is not None]
        return sum(found) if isinstance(batch, dict) else super().loss(batch)


def resumable(n):
    dataset = loader(n).dataset
    return la.ResumableLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 1, 0, seed=0))


@pytest.mark.parametrize(
    "make",
    [lambda n: loader(n, shuffle=True), pytest.param(resumable, marks=pytest.mark.slow)],
    ids=["plain", "resumable"],
)
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

    batches = 1

    def training_step(self, dataloader_iter):
        for _ in range(self.batches):
            batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=4)
        return loss


def test_a_step_that_takes_its_batches_itself(tmp_path):
    resumed_equals_whole(tmp_path, Iterating, six_batches, (2, 5, 8))


def test_a_step_that_takes_several_batches_is_warned_of(tmp_path):
    class Twice(Iterating):
        batches = 2

    def data():
        return loader(22, shuffle=True, generator=torch.Generator().manual_seed(3))

    save, kept = SaveAfter(tmp_path, 1), ModelCheckpoint(tmp_path / "ends", filename="{epoch}")
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    whole, resumed = Twice(), Twice()
    fit(tmp_path, whole, la.AdapterCallback(figures=False), save, kept, data=data(), **settings)
    with pytest.warns(UserWarning, match="whose order is not known"):
        fit(tmp_path, Twice(), la.AdapterCallback(figures=False), data=data(), ckpt=save.path(1), **settings)
    kept = ModelCheckpoint(tmp_path / "again", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, Twice(), la.AdapterCallback(figures=False), kept, data=data(), **settings | {"max_epochs": 1})
    end = tmp_path / "again" / "epoch=0.ckpt"
    fit(tmp_path, resumed, la.AdapterCallback(figures=False), data=data(), ckpt=end, **settings)
    assert_equal_bits(state(resumed), state(whole))


class Skipping(Task):
    """Ends every epoch before its last batches."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 4 else None


def test_an_epoch_that_the_module_ends(tmp_path):
    """It ends with the first batch after the resume, or has ended."""
    resumed_equals_whole(tmp_path, Skipping, six_batches, (4, 6))
    validations = []

    class Counting(Callback):
        def on_validation_end(self, trainer, module):
            validations.append(trainer.current_epoch)

    settings = {"data": six_batches(), "max_epochs": 2, "num_sanity_val_steps": 0}
    kept = ModelCheckpoint(tmp_path / "ends", save_top_k=-1, filename="{epoch}")
    whole, resumed = Skipping(), Skipping()
    first = fit(tmp_path, whole, la.AdapterCallback(figures=False), kept, Counting(), **settings)
    assert validations == []  # Lightning leaves them out
    end = tmp_path / "ends" / "epoch=0.ckpt"
    settings["data"] = six_batches()
    second = fit(tmp_path, resumed, la.AdapterCallback(figures=False), Counting(), ckpt=end, **settings)
    assert validations == []
    steps = [run.fit_loop.epoch_loop._batches_that_stepped for run in (first, second)]
    assert steps[0] == steps[1]
    assert_equal_bits(state(resumed), state(whole))


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


def schedule():
    return GradientAccumulationScheduler({0: 1, 1: 3})


@pytest.mark.parametrize("settings", [{}, VALIDATING], ids=["", "validations"])
def test_accumulation_by_a_schedule(tmp_path, settings):
    resumed_equals_whole(tmp_path, Task, six_batches, (3, 6, 8, 10), schedule, **settings)


def test_accumulation_by_a_schedule_from_what_a_validation_saves(tmp_path):
    """Nothing of the validation is repeated, and what is logged after it has the same steps."""

    def run(folder, ckpt=None):
        diary, task = Diary(), Task()
        kept = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", save_on_train_epoch_end=False)
        callbacks = [la.AdapterCallback(figures=False), schedule(), kept]
        settings = {"val_check_interval": 2, "max_epochs": 2, "logger": diary}
        fit(tmp_path, task, *callbacks, data=six_batches(), ckpt=ckpt, **settings)
        return diary.records, state(task)

    records, want = run(tmp_path / "whole")
    paths = sorted((tmp_path / "whole").glob("epoch=1-*.ckpt"))
    assert paths
    for path in paths:
        found, end = run(tmp_path / path.stem, path)
        assert found == records[len(records) - len(found) :]
        assert_equal_bits(end, want)


def test_a_failed_fit_leaves_nothing_to_the_next(tmp_path):
    """The same callback trains again, without a checkpoint."""

    class Failing(Callback):
        def on_fit_start(self, trainer, module):
            raise RuntimeError("on purpose")

    save = SaveAfter(tmp_path, 3)
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), save, data=six_batches())
    used, states = la.AdapterCallback(figures=False), []
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Task(), Failing(), used, data=six_batches(), ckpt=save.path(3))
    for callback in (used, la.AdapterCallback(figures=False)):
        torch.manual_seed(0)
        task = Task()
        fit(tmp_path, task, callback, data=six_batches())
        states.append(state(task))
    assert_equal_bits(*states)


def test_gradients_that_wait_are_saved_again(tmp_path):
    """SIGTERM comes before the first batch of a run that was resumed between two optimiser steps."""

    class Stopped(Callback):
        def on_train_start(self, trainer, module):
            raise SIGTERMException

    settings = {"data": loader(22), "accumulate_grad_batches": 4}
    save, whole, resumed = SaveAfter(tmp_path, 2), Task(), Task()
    fit(tmp_path, whole, la.AdapterCallback(figures=False), save, **settings)
    held = torch.load(save.path(2), weights_only=True)["lit_adapters"]["processes"][0]["gradients"]
    with pytest.raises(SystemExit):
        fit(tmp_path, Task(), la.AdapterCallback(figures=False), Stopped(), ckpt=save.path(2), **settings)
    interrupted = tmp_path / "last-interrupted.ckpt"
    again = torch.load(interrupted, weights_only=True)["lit_adapters"]["processes"][0]["gradients"]
    assert held
    assert_equal_bits(held, again)
    fit(tmp_path, resumed, la.AdapterCallback(figures=False), ckpt=interrupted, **settings)
    assert_equal_bits(state(resumed), state(whole))


def test_a_gradient_of_another_shape_is_refused(tmp_path):
    save = SaveAfter(tmp_path, 2)
    settings = {"data": loader(22), "accumulate_grad_batches": 4}
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), save, **settings)
    edited = torch.load(save.path(2), weights_only=True)
    edited["lit_adapters"]["processes"][0]["gradients"]["net.head.bias"] = torch.ones(2)
    torch.save(edited, tmp_path / "x.ckpt")
    with pytest.raises(la.AdapterError, match=r"gradient of 'net\.head\.bias' has the shape \(2,\), and the parameter"):
        fit(tmp_path, Task(), la.AdapterCallback(figures=False), ckpt=tmp_path / "x.ckpt", **settings)


class WithoutNorm(Task):
    """Averaged weights need no pass over the data."""

    def __init__(self):
        super().__init__()
        self.net.norm = torch.nn.Identity()


def averaging():
    return StochasticWeightAveraging(1e-2, 1)


_RATES = SWALR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), 0.1).state_dict()
SAVED_AS_VALUES = pytest.mark.skipif(
    any(map(callable, _RATES.values())),
    reason="this torch saves a function with the schedule of weight averaging, and no checkpoint may hold one",
)


@SAVED_AS_VALUES
@pytest.mark.parametrize("settings", [{}, VALIDATING], ids=["", "validations"])
def test_weight_averaging(tmp_path, settings):
    resumed_equals_whole(tmp_path, WithoutNorm, six_batches, (3, 6, 8, 15), averaging, max_epochs=3, **settings)


@SAVED_AS_VALUES
def test_weight_averaging_before_batch_norms_are_measured(tmp_path):
    resumed_equals_whole(tmp_path, Task, six_batches, (3, 10, 12), averaging)


@SAVED_AS_VALUES
@pytest.mark.parametrize("batch", [14, 18])
def test_a_pass_that_measures_batch_norms_is_refused(tmp_path, batch):
    """In its middle, and after its last batch."""
    save = SaveAfter(tmp_path, batch)
    settings = {"data": six_batches(), "max_epochs": 2}
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), save, averaging(), **settings)
    with pytest.raises(la.AdapterError, match=r"\d\d\.ckpt' was written while StochasticWeightAveraging measured"):
        fit(tmp_path, Task(), la.AdapterCallback(figures=False), averaging(), ckpt=save.path(batch), **settings)


def test_values_of_other_kinds_among_the_logged_ones(tmp_path):
    """A user's callback may put a number there."""

    class Counting(Callback):
        def on_train_batch_end(self, trainer, *rest):
            trainer.callback_metrics["mine"] = 3.0

    save = SaveAfter(tmp_path, 3)
    fit(tmp_path, Task(), la.AdapterCallback(figures=False), Counting(), save, data=six_batches())
    held = torch.load(save.path(3), weights_only=True)["lit_adapters"]["processes"][0]["metrics"]
    assert held.keys() == {"train/loss"}
