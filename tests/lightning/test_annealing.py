"""Annealing by optimiser steps, adaptive annealing, what is logged, resuming, and ends that come too early."""

import itertools
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

import lit_adapters as la
from lit_adapters.schedules import Adaptive, Hold, Linear
from tests.lightning.tiny_task import Task, assert_equal_bits, events, fit, loader, state


def afa(schedule, **changes) -> la.AFALoRA:
    return la.AFALoRA(rank=2, alpha=4.0, activation="silu", schedule=schedule, **changes)


class Betas(Callback):
    """Records the beta that each training batch runs with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        betas = {a.beta.item() for _, a in la.adapters(pl_module)}
        assert len(betas) == 1
        self.seen += betas


def betas(task: Task) -> set[float]:
    return {a.beta.item() for _, a in la.adapters(task)}


@pytest.mark.parametrize(
    ("settings", "steps", "per_batch"),
    [
        ({"max_epochs": 2}, 12, 1),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 1),
        ({"max_epochs": -1, "max_steps": 5}, 5, 1),
    ],
    ids=["epochs", "accumulation", "limit", "max_steps"],
)
def test_beta_follows_the_optimiser_steps(tmp_path, settings, steps, per_batch):
    schedule, record, task = Linear(start=0.0, end=0.75), Betas(), Task(afa(Linear(start=0.0, end=0.75)))
    fit(tmp_path, task, la.AdapterCallback(), record, **settings)
    expected = [schedule(step / steps) for step in range(steps) for _ in range(per_batch)]
    assert record.seen == pytest.approx(expected)
    assert betas(task) == {0.0}
    report = la.merge(task.net)
    assert len(report.merged) == 4


def test_every_schedule_of_a_model_is_followed(tmp_path):
    first, second = afa(Linear(end=0.5), targets=["fc1"]), afa(Linear(end=1.0), targets=["fc2"])
    seen: list[tuple[float, float]] = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            block = pl_module.net.blocks[0]
            seen.append((block.fc1.beta.item(), block.fc2.beta.item()))

    fit(tmp_path, Task([first, second]), la.AdapterCallback(), Record())
    assert seen == [pytest.approx((max(0.0, 1 - i / 3), 1 - i / 6)) for i in range(6)]


def test_beta_is_logged_and_in_the_progress_bar(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(tmp_path, Task(afa(Linear(end=0.5))), la.AdapterCallback(log_every_n_steps=1), logger=logger)
    assert [e.value for e in events(logger.log_dir).Scalars("adapter/beta")] == pytest.approx(
        [1, 2 / 3, 1 / 3, 0, 0, 0, 0]
    )
    assert trainer.progress_bar_metrics["adapter/beta"] == 0.0


def test_without_schedules_there_is_no_beta(tmp_path):
    trainer = fit(tmp_path, Task(la.LoRA(rank=2)))
    assert "adapter/beta" not in trainer.callback_metrics


class Losses(Task):
    """A task whose loss is told to rise or to fall; the gradient stays that of the true one."""

    def __init__(self, slope: float, methods) -> None:
        super().__init__(methods)
        self.slope = slope

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss - loss.detach() + 1.0 + self.slope * self.trainer.global_step


def test_adaptive_annealing_waits_while_the_loss_rises_until_its_deadline(tmp_path):
    schedule = Adaptive(start=0.0, duration=0.25, end=0.75, window=5)
    falling, rising = Betas(), Betas()
    fit(tmp_path, Losses(-0.01, afa(schedule)), la.AdapterCallback(), falling, max_epochs=4)
    fit(tmp_path, Losses(0.01, afa(schedule)), la.AdapterCallback(), rising, max_epochs=4)
    assert falling.seen == pytest.approx([max(0.0, 1 - i / 6) for i in range(24)])
    # One step passes before the smoothed loss is known to rise; then the ramp that ends at 18 of 24 steps is left.
    assert rising.seen == pytest.approx([1.0, *(min(5 / 6, (18 - i) / 6) if i < 18 else 0.0 for i in range(1, 24))])


class Rewarded(Losses):
    """Logs a reward that falls, or one that rises, while its loss falls."""

    def training_step(self, batch, batch_idx):
        self.log("train/reward", 2.0 + self.reward_slope * self.global_step)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("named", [True, False], ids=["by the schedule", "by the module"])
@pytest.mark.parametrize("slope", [0.1, -0.1])
def test_adaptive_annealing_looks_at_a_logged_value(tmp_path, named, slope):
    schedule = Adaptive(duration=0.25, end=0.75, window=5, monitor="train/reward" if named else None)
    task, record = Rewarded(-0.01, afa(schedule)), Betas()
    task.reward_slope = slope
    if not named:
        task.default_monitor = "train/reward"
    fit(tmp_path, task, la.AdapterCallback(), record, max_epochs=4)
    rising = [max(0.0, 1 - i / 6) for i in range(24)]
    falling = [1.0, *(min(5 / 6, (18 - i) / 6) if i < 18 else 0.0 for i in range(1, 24))]
    assert record.seen == pytest.approx(rising if slope > 0 else falling)


def test_a_monitor_that_is_not_logged_is_named(tmp_path):
    schedule = Adaptive(monitor="train/rewards")
    with pytest.raises(la.AdapterError, match=r"looks at 'train/rewards', which .* not logged; .* train/loss"):
        fit(tmp_path, Task(afa(schedule)), la.AdapterCallback())


def test_a_value_that_is_returned_in_the_old_way_is_refused(tmp_path):
    class Old(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "followed": -loss.detach()}

    with pytest.raises(la.AdapterError, match="returns `followed`, which adaptive schedules no longer look at"):
        fit(tmp_path, Old(afa(Adaptive())), la.AdapterCallback())
    assert fit(tmp_path, Old(afa(Linear())), la.AdapterCallback()).global_step == 6


class Stop(Callback):
    """Asks for the end of a training after so many optimiser steps, and keeps asking."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def test_adaptive_annealing_resumes_bit_for_bit(tmp_path):
    def run(folder: str, *more: Callback, ckpt=None) -> tuple[Task, list[float]]:
        torch.manual_seed(0)
        task, record = Task(afa(Adaptive(duration=0.4, end=1.0, window=5)), lr=0.1), Betas()
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = (la.AdapterCallback(), record, saver, *more)
        fit(tmp_path, task, *callbacks, max_epochs=4, ckpt=ckpt, limit_val_batches=0)
        return task, record.seen

    whole, seen = run("whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training ended with")
        _, first = run("half", Stop(12))
    resumed, second = run("rest", ckpt=tmp_path / "half" / "last.ckpt")
    assert len(first) == 12
    assert len({round(a - b, 6) for a, b in itertools.pairwise(seen)}) > 1  # it fell in some steps and not in others
    assert first + second == seen
    assert_equal_bits(state(whole), state(resumed))


def test_ending_early_warns_and_merging_is_refused(tmp_path):
    task = Task(afa(Linear(end=1.0)))
    with pytest.warns(UserWarning, match="training ended with 4 adapters still nonlinear"):
        fit(tmp_path, task, la.AdapterCallback(), Stop(2), max_epochs=3)
    before = state(task)
    with pytest.raises(la.AdapterError, match=r"'blocks.0.fc1' is nonlinear at beta = 0\.[0-9]+, and no weight"):
        la.merge(task.net)
    assert_equal_bits(before, state(task))


@pytest.mark.parametrize(
    ("schedule", "finalize", "end"),
    [
        (Linear(end=0.5), True, 33),  # of 60 steps: half, and a twentieth that is linear
        (Adaptive(duration=0.3, end=0.8), True, 51),
        (Hold(0.0), True, 4),
        (Hold(1.0), True, 4),  # never linear, so there is nothing to wait for
        (Linear(end=0.5), False, 4),
    ],
    ids=["linear", "adaptive", "linear-from-the-start", "never", "not-asked"],
)
def test_an_early_stop_waits_for_linear_steps_if_asked(tmp_path, schedule, finalize, end):
    task = Task(afa(schedule))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = fit(tmp_path, task, la.AdapterCallback(finalize=finalize), Stop(4), max_epochs=10)
    assert running.global_step == end
    nonlinear = schedule(1.0) > 0 or (not finalize and schedule(0.0) > 0)
    assert any("still nonlinear" in str(w.message) for w in caught) == nonlinear
    assert (betas(task) == {0.0}) != nonlinear


def test_training_on_does_not_heat_up_what_is_linear(tmp_path):
    task, record = Task(afa(Linear(end=0.5))), Betas()
    fit(tmp_path, task, la.AdapterCallback())
    assert betas(task) == {0.0}
    fit(tmp_path, task, la.AdapterCallback(), record)
    assert set(record.seen) == {0.0}
    la.set_progress(task, 0.0)
    fit(tmp_path, task, la.AdapterCallback(), again := Betas())
    assert again.seen[0] == 1.0


def test_a_best_checkpoint_from_before_the_end_is_named(tmp_path):
    class Worse(Task):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(float(self.trainer.global_step)))

    saver = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    with pytest.warns(UserWarning, match=r"epoch=0-step=6.ckpt is the best by 'val/loss' and still nonlinear"):
        fit(tmp_path, Worse(afa(Linear(end=0.9))), la.AdapterCallback(), saver, max_epochs=2)


def test_another_tensor_called_beta_is_no_annealing(tmp_path, recwarn):
    task = Task(afa(Linear(end=0.5)))
    task.register_module("norm", torch.nn.Module())
    task.norm.register_buffer("beta", torch.ones(4))
    saver = ModelCheckpoint(tmp_path / "best", monitor="train/loss")
    fit(tmp_path, task, la.AdapterCallback(), saver, max_epochs=2)
    assert not any("still nonlinear" in str(w.message) for w in recwarn)


def test_holding_ends_unmergeable_and_says_so(tmp_path):
    task = Task(afa(Hold(0.5)))
    with pytest.warns(UserWarning, match="still nonlinear"):
        fit(tmp_path, task, la.AdapterCallback())
    with pytest.raises(la.AdapterError, match="never reaches 0"):
        la.merge(task.net)


def test_a_training_without_end_is_refused(tmp_path):
    with pytest.raises(la.AdapterError, match="this training has no end that is known; set max_steps"):
        fit(tmp_path, Task(afa(Linear())), la.AdapterCallback(), max_epochs=-1, max_time="00:00:01:00")


def test_data_of_unknown_length_need_max_steps(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    data = DataLoader(Stream(), batch_size=4)
    with pytest.raises(la.AdapterError, match="no end that is known; set max_steps"):
        fit(tmp_path, Task(afa(Linear(end=0.5))), la.AdapterCallback(), data=data, max_epochs=2)
    task = Task(afa(Linear(end=0.5)))
    fit(tmp_path, task, la.AdapterCallback(), data=data, max_epochs=-1, max_steps=6)
    assert betas(task) == {0.0}


class TwoOptimisers(Task):
    """Manual optimisation of two losses in turn, one block's adapters each."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for block, optimizer in zip(self.net.blocks, self.optimizers(), strict=True):
            optimizer.zero_grad()
            loss = (self.net.head(self.net.norm(block(batch[0]))) - 1.0).square().mean()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        first, second = ([p for p in b.parameters() if p.requires_grad] for b in self.net.blocks)
        return [torch.optim.SGD([*first, *self.net.head.parameters()], lr=1e-2), torch.optim.SGD(second, lr=1e-2)]


@pytest.mark.parametrize(
    "limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 24}, {"max_epochs": 2, "max_steps": 24}]
)
def test_two_optimisers_in_turns(tmp_path, limit):
    """Lightning counts the steps of both, also against max_steps; the second's adapters run after a first backward."""
    record, task = Betas(), TwoOptimisers(afa(Linear(end=0.5)))
    running = fit(tmp_path, task, la.AdapterCallback(), record, **{"max_epochs": 2} | limit)
    assert running.global_step == 24
    assert record.seen == pytest.approx([max(0.0, 1 - i / 6) for i in range(12)])


def test_a_best_checkpoint_with_values_of_other_classes(tmp_path):
    """The warning about it is left out; the fit ends well."""

    class Known(Task):
        def __init__(self):
            super().__init__(afa(Linear(end=0.5)))
            self.save_hyperparameters({"root": tmp_path})

    saver = ModelCheckpoint(tmp_path / "kept", monitor="val/loss")
    running = fit(tmp_path, Known(), la.AdapterCallback(), saver)
    assert running.state.finished


def test_a_merged_model_is_not_trained(tmp_path):
    task = Task(la.LoRA(rank=2))
    la.merge(task.net, unload=False)
    with pytest.raises(la.AdapterError, match=r"is merged and would not learn; call lit_adapters.unmerge"):
        fit(tmp_path, task, la.AdapterCallback())


def test_a_dead_relu_is_not_taken_for_a_layer_that_cannot_learn(tmp_path):
    task = Task(la.AFALoRA(rank=1, activation="relu", targets=["blocks.0.fc2"], schedule=Linear(end=0.5)), train=())
    with torch.no_grad():
        task.net.blocks[0].fc2.lora_A.fill_(-1e3)
        task.net.blocks[0].fc1.bias.fill_(5.0)
    fit(tmp_path, task, la.AdapterCallback())
    assert task.net.blocks[0].fc2.lora_B.any()
