"""In which order the data module gives its samples: a function of seed and epoch alone, in any number of processes."""

from __future__ import annotations

import lightning
import numpy as np
import pytest
import torch

from lit_adapters.lightning.resume.sampler import EpochSampler
from tests.vision.image_folders import batches, fitted, module
from tests.vision.recorder import Recorder
from vision.data import CIFARDataModule
from vision.sampling import flips


def epochs(data: CIFARDataModule, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    result = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        result.append(batches(loader))
    return result


def test_order_and_flips_depend_on_seed_and_epoch_only(folder):
    torch.manual_seed(0)
    reference = epochs(fitted(folder))
    torch.manual_seed(1)
    for data in (fitted(folder), fitted(folder, num_workers=2), fitted(folder, seed=0, order_seed=0)):
        for (x, y), (expected_x, expected_y) in zip(epochs(data), reference, strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
    assert not torch.equal(reference[0][0], reference[1][0])
    assert not torch.equal(epochs(fitted(folder, order_seed=1))[0][0], reference[0][0])


def test_every_seed_and_epoch_has_its_own_order_and_flips():
    keys = [(seed, epoch) for seed in range(2) for epoch in range(2)]
    orders, coins = set(), []
    for seed, epoch in keys:
        sampler = EpochSampler(range(2000), seed)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        assert sorted(index for _, index in pairs) == list(range(2000))
        orders.add(tuple(index for _, index in pairs))
        coins.append([flips(seed, epoch, index) for index in range(2000)])
    assert len(orders) == len(keys)
    # Fair and uncorrelated: 0.1 is 4.5 standard errors of a correlation of 2,000 coins.
    tossed = np.array(coins, dtype=float)
    assert np.abs(tossed.mean(1) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(tossed) - np.eye(len(keys))).max() < 0.1


def test_loading_leaves_the_global_random_state_alone(folder):
    data = fitted(folder)
    before = torch.get_rng_state()
    epochs(data)
    batches(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def trainer(**changes) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", max_epochs=2, **quiet, **changes)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_trainer_tells_the_sampler_the_epoch(folder, num_workers):
    model = Recorder()
    trainer(limit_val_batches=0).fit(model, datamodule=module(folder, num_workers=num_workers))
    for seen, (expected, _) in zip(model.seen, epochs(fitted(folder)), strict=True):
        assert torch.equal(torch.cat(seen), expected)


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches_repeats_unmirrored_batches(folder):
    model = Recorder()
    trainer(overfit_batches=2).fit(model, datamodule=module(folder))
    assert torch.equal(torch.cat(model.seen[0]), torch.cat(model.seen[1]))


def test_replicas_share_an_epoch():
    samplers = [EpochSampler(range(10), seed=3, num_replicas=4, rank=rank) for rank in range(4)]
    whole = EpochSampler(range(10), seed=3)
    for sampler in [*samplers, whole]:
        sampler.set_epoch(7)
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [3] * 4
    merged = [pair for row in zip(*shares, strict=True) for pair in row]
    assert merged[:10] == list(whole)
    assert merged[10:] == merged[:2]
    assert {epoch for epoch, _ in merged} == {7}


def test_train_loader_takes_this_process_share(folder):
    data = fitted(folder)
    data.trainer = trainer(strategy="ddp", devices=2)
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (2, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_see_the_single_process_order(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    distributed = trainer(strategy="ddp_spawn", devices=2, limit_val_batches=0)
    distributed.fit(Recorder(out), datamodule=module(folder, batch_size=4))
    shares = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    for epoch, (expected, _) in enumerate(epochs(fitted(folder))):
        assert torch.equal(torch.stack([share[epoch] for share in shares], 1).flatten(0, 1), expected)
