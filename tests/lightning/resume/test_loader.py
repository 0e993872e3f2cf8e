"""The loader goes on exactly where the training was, whoever reads ahead."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from language.data.packing import BucketSampler
from lit_adapters import AdapterError, ResumableLoader
from lit_adapters.lightning.resume.sampler import EpochSampler

N, BATCH = 22, 4


class Counted(Dataset):
    """Its own keys, and which of them were asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return N

    def __getitem__(self, key):
        self.asked.append(key)
        return torch.tensor(key)


def make(sampler="epoch", rank=0, replicas=1, dataset=None, **changes):
    dataset = dataset or Counted()
    lengths = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    samplers = {
        "epoch": lambda: EpochSampler(dataset, 3, replicas, rank),
        "buckets": lambda: BucketSampler(lengths, BATCH, 3, replicas, rank),
        "distributed": lambda: DistributedSampler(dataset, replicas, rank, seed=3),
        "sequential": lambda: SequentialSampler(dataset),
    }
    return ResumableLoader(dataset, batch_size=BATCH, sampler=samplers[sampler](), **changes)


def epochs(loader, *numbers):
    read = []
    for epoch in numbers:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        read += [batch.tolist() for batch in loader]
    return read


@pytest.mark.parametrize("sampler", ["epoch", "buckets", "distributed", "sequential"])
@pytest.mark.parametrize(("rank", "replicas"), [(0, 1), (1, 2)])
def test_every_point_of_an_epoch(sampler, rank, replicas):
    if sampler == "sequential" and rank:
        pytest.skip("has no replicas")
    whole = make(sampler, rank, replicas)
    want = epochs(whole, 1, 2)
    per_epoch = len(whole)
    for k in range(per_epoch + 1):
        killed = make(sampler, rank, replicas)
        epochs(killed, 0)
        if hasattr(killed.sampler, "set_epoch"):
            killed.sampler.set_epoch(1)
        batches = iter(killed)
        read = [next(batches).tolist() for _ in range(k)]
        assert read == want[:k]
        state = killed.state_dict() if k else {"epoch": 1, "batches": 0, "length": per_epoch}
        assert state == {"epoch": 1 if sampler != "sequential" else 0, "batches": k, "length": per_epoch} or not k
        resumed = make(sampler, rank, replicas)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert len(resumed) == per_epoch
        rest = [batch.tolist() for batch in resumed]
        assert rest == want[k:per_epoch]
        assert len(resumed.dataset.asked) == sum(map(len, rest))  # what is skipped is not loaded
        assert epochs(resumed, 2) == want[per_epoch:]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_read_ahead_and_do_not_count(persistent):
    want = epochs(make(), 0, 1)
    workers = {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": persistent}
    killed = make(**workers)
    batches = iter(killed)
    assert [next(batches).tolist() for _ in range(2)] == want[:2]
    state = killed.state_dict()
    assert state == {"epoch": 0, "batches": 2, "length": 6}
    resumed = make(**workers)
    resumed.load_state_dict(state)
    assert [b.tolist() for b in resumed] + epochs(resumed, 1) == want[2:]


def test_a_second_iterator_begins_anew_and_the_one_read_last_counts():
    loader = make()
    training, other = iter(loader), iter(loader)
    next(other)
    next(other)
    assert loader.state_dict()["batches"] == 2
    next(training)
    assert loader.state_dict()["batches"] == 1


def test_an_epoch_set_after_the_iterator_was_made():
    loader = make(num_workers=2)
    batches = iter(loader)
    loader.sampler.set_epoch(5)
    assert [b.tolist() for b in batches] == epochs(make(), 5)


def test_going_on_leaves_the_random_state_alone():
    loader = make()
    loader.load_state_dict({"epoch": 0, "batches": 2, "length": 6})
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_data_are_refused():
    with pytest.raises(AdapterError, match=r"an epoch of 5 batches, the data make 6 now"):
        make().load_state_dict({"epoch": 0, "batches": 2, "length": 5})


def test_orders_that_cannot_be_repeated_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(4))

    with pytest.raises(AdapterError, match="cannot repeat the order of shuffle=True"):
        ResumableLoader(Counted(), shuffle=True)
    with pytest.raises(AdapterError, match="IterableDataset cannot skip"):
        ResumableLoader(Stream())


def test_without_a_state_it_is_a_dataloader():
    dataset = Counted()
    plain = DataLoader(dataset, batch_size=BATCH, sampler=EpochSampler(dataset, 3))
    assert epochs(make(), 0, 1) == epochs(plain, 0, 1)
