"""A user's own module and plain DataLoader, resumed in mid-epoch: the next batch comes, bit for bit."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import lit_adapters as la
from tests.lightning.resume.resumed import STEPS, compare
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, nora, state
from tests.tiers import fast_only

BATCHES = 12


def rows(n=4 * BATCHES - 2):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(n) % 3)


def seeded():
    return torch.Generator().manual_seed(3)


class Augmented(Dataset):
    """Rows with noise from the global random state."""

    def __len__(self):
        return 46

    def __getitem__(self, index):
        return torch.full((8,), index / 46) + 0.1 * torch.randn(8), index % 3


def of_sampler(make):
    return lambda: DataLoader(rows(), 4, sampler=make(rows()))


LOADERS = {
    "in order": lambda: DataLoader(rows(), 4),
    "shuffled": lambda: DataLoader(rows(), 4, shuffle=True),
    "shuffled, last batch dropped": lambda: DataLoader(rows(), 4, shuffle=True, drop_last=True),
    "shuffled by a generator": lambda: DataLoader(rows(), 4, shuffle=True, generator=seeded()),
    "augmented": lambda: DataLoader(Augmented(), 4, shuffle=True),
    "with replacement": of_sampler(lambda r: RandomSampler(r, replacement=True, num_samples=50, generator=seeded())),
    "longer than the data": of_sampler(lambda r: RandomSampler(r, num_samples=60, generator=seeded())),
    "weighted": of_sampler(lambda r: WeightedRandomSampler([1.0, 2.0] * (len(r) // 2), 48)),
    "a subset": of_sampler(lambda r: SubsetRandomSampler(range(40))),
    "a list": of_sampler(lambda r: list(reversed(range(len(r))))),
    "batches of a sampler": lambda: DataLoader(rows(), batch_sampler=BatchSampler(RandomSampler(rows()), 4, True)),
    "a list of batches": lambda: DataLoader(rows(), batch_sampler=[[i, i + 1, i + 2] for i in range(24)]),
}
METHODS = {
    "afa": lambda: la.AFALoRA(rank=2, activation="silu"),
    "dense_lora": lambda: la.DenseLoRA(rank=2, dropout=0.2),
    "point_lora": lambda: la.PointLoRA(rank=2, targets="all-linear", blocks=[], dropout=0.2),
    "nested_lora": lambda: la.NestedLoRA(rank=3, inner_rank=2),
    "nora": lambda: nora(fit_range="calibrate"),
    "nora++": lambda: la.NoRAPlusPlus(nora=nora(), lora=la.LoRA(rank=2)),
}


class SaveAt(Callback):
    """Saves after these steps."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path(trainer.global_step))

    def path(self, step):
        return self.folder / f"{step}.ckpt"


def resumed_equals_whole(tmp_path, method, loader, steps):
    whole, save = Task(METHODS[method]()), SaveAt(tmp_path, *steps)
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    fit(tmp_path, whole, la.AdapterCallback(), save, data=LOADERS[loader](), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mid-epoch|.*before the epoch ended")
        for step in steps:
            torch.manual_seed(step)
            resumed = Task(METHODS[method]())
            fit(tmp_path, resumed, la.AdapterCallback(), data=LOADERS[loader](), ckpt=save.path(step), **settings)
            assert_equal_bits(state(resumed), state(whole))


@pytest.mark.parametrize("method", fast_only(["nora", "dense_lora"], METHODS))
def test_at_steps_of_an_epoch(tmp_path, method):
    resumed_equals_whole(tmp_path, method, "shuffled", (5, 12, 17))


@pytest.mark.parametrize("loader", LOADERS)
def test_every_order_that_is_known(tmp_path, loader):
    resumed_equals_whole(tmp_path, "afa", loader, (BATCHES + 3,))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("generator", [None, seeded])
def test_with_workers(tmp_path, generator, persistent):
    def data():
        own = None if generator is None else generator()
        return DataLoader(rows(22), 4, shuffle=True, generator=own, num_workers=2, persistent_workers=persistent)

    compare(tmp_path, data, STEPS, every=3)


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(45, -1, -1))

    def __len__(self):
        return 46


class Stream(IterableDataset):
    def __iter__(self):
        return iter([rows()[i] for i in range(46)])


UNKNOWN = {
    "a sampler of one's own": lambda: DataLoader(rows(), 4, sampler=Backwards()),
    "a stream": lambda: DataLoader(Stream(), 4),
}


@pytest.mark.parametrize("loader", UNKNOWN)
def test_an_unknown_order_is_warned_of(tmp_path, loader):
    save = SaveAt(tmp_path, 5)
    settings = {"max_epochs": 1, "limit_val_batches": 0, "max_steps": BATCHES}
    fit(tmp_path, Task(la.LoRA(rank=2)), la.AdapterCallback(), save, data=UNKNOWN[loader](), **settings)
    with pytest.warns(UserWarning, match=r"whose order is not known.*ResumableLoader.*end of an epoch"):
        fit(tmp_path, Task(la.LoRA(rank=2)), data=UNKNOWN[loader](), ckpt=save.path(5), **settings)


def test_other_data_are_refused(tmp_path):
    save = SaveAt(tmp_path, 5)
    fit(tmp_path, Task(la.LoRA(rank=2)), la.AdapterCallback(), save, data=DataLoader(rows(), 4, shuffle=True))
    with pytest.raises(la.AdapterError, match="an epoch of 12 batches, the data make 5 now"):
        fit(tmp_path, Task(la.LoRA(rank=2)), data=DataLoader(rows(20), 4, shuffle=True), ckpt=save.path(5))
