"""Rows of documents: that packing changes no loss, that padding and buckets lose nothing, and their order."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from language.data.packing import BucketSampler, PackedCollator, PaddedCollator, TokenDataset, pack
from language.data.tokenise import IGNORED, Documents
from lit_adapters.lightning.resume.sampler import EpochSampler, permutation

LENGTHS = [5, 9, 3, 7, 4]


def documents(lengths=LENGTHS, seed=0):
    """Random documents; about half of their tokens are learned, never the first."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    learned = torch.rand(total, generator=generator) < 0.5
    learned[offsets[1:] - 1] = True
    learned[offsets[:-1]] = False
    return Documents(torch.randint(1, 60, (total,), generator=generator, dtype=torch.int32), learned, offsets)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@torch.no_grad()
def token_losses(model, batch, **changes):
    """The loss of every learned token, in order."""
    inputs = {k: v for k, v in batch.items() if k != "labels"} | changes
    logits = model(**{k: v for k, v in inputs.items() if v is not None}, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="none")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_losses_equal_those_of_the_documents(make):
    model, docs = make(), documents()
    rows = [[0, 2, 1], [4, 3]]
    packed = PackedCollator(0)(list(map(TokenDataset(docs, rows).__getitem__, [0, 1])))
    alone = TokenDataset(docs, [[i] for i in range(len(docs))])
    expected = torch.cat([token_losses(model, PaddedCollator(0)([alone[i]])) for row in rows for i in row])
    assert len(expected) == int(docs.learned.sum()) > 10
    torch.testing.assert_close(token_losses(model, packed), expected, rtol=1e-4, atol=1e-5)
    # What the batch must not have, and must have, for that to hold.
    with_mask = token_losses(model, packed, attention_mask=torch.ones_like(packed["input_ids"]))
    without_positions = token_losses(model, packed, position_ids=None)
    for other in (with_mask, without_positions):
        assert (other - expected).abs().max() > 1e-3


def test_packed_batch():
    docs = documents()
    batch = PackedCollator(7)(list(map(TokenDataset(docs, [[0, 2], [3, 4]]).__getitem__, [0, 1])))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 11)
    assert batch["position_ids"].tolist() == [[*range(5), *range(3), *range(3)], [*range(7), *range(4)]]
    assert batch["labels"][batch["position_ids"] == 0].eq(IGNORED).all()
    assert batch["input_ids"][0, 8:].tolist() == [7, 7, 7]
    assert batch["labels"][0, 8:].tolist() == [IGNORED] * 3
    assert torch.equal(batch["input_ids"][1], torch.cat([docs[3][0], docs[4][0]]))
    assert torch.equal(batch["labels"][1], torch.cat([docs[3][1], docs[4][1]]))


def test_padded_batch():
    docs = documents()
    batch = PaddedCollator(7)(list(map(TokenDataset(docs, [[0], [1]]).__getitem__, [0, 1])))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 4, [1] * 9]
    assert batch["input_ids"][0, 5:].tolist() == [7] * 4
    assert batch["labels"][0, 5:].tolist() == [IGNORED] * 4
    assert torch.equal(batch["input_ids"][1], docs[1][0])
    assert torch.equal(batch["labels"][0, :5], docs[0][1])


def test_padding_changes_no_loss():
    model, docs = llama(), documents()
    alone = TokenDataset(docs, [[i] for i in range(len(docs))])
    expected = torch.cat([token_losses(model, PaddedCollator(0)([alone[i]])) for i in range(len(docs))])
    together = token_losses(model, PaddedCollator(0)([alone[i] for i in range(len(docs))]))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_pack_uses_every_document_once_and_fills_rows():
    lengths = torch.randint(1, 101, (500,), generator=torch.Generator().manual_seed(0))
    lengths = torch.cat([lengths, torch.tensor([100, 100])])
    rows = pack(lengths, 100, "train", 3)
    assert len(rows) == len(list(rows))
    assert sorted(i for row in rows for i in row) == list(range(502))
    assert max(int(lengths[row].sum()) for row in rows) == 100
    assert lengths.sum() / (100 * len(rows)) > 0.9
    assert list(pack(lengths, 100, "train", 3)) == list(rows)
    assert list(pack(lengths, 100, "train", 4)) != list(rows)


def test_pack_takes_the_fullest_row_with_room(monkeypatch):
    """Against a plain search through all rows, in more than one chunk."""
    monkeypatch.setattr("language.data.packing._CHUNK", 64)
    lengths = torch.randint(1, 11, (300,), generator=torch.Generator().manual_seed(1))
    expected: list[list[int]] = []
    for index in permutation(300, "pack", "key").tolist():
        sums = [int(lengths[row].sum()) for row in expected]
        fitting = [(-total, i) for i, total in enumerate(sums) if total + lengths[index] <= 10]
        if fitting:
            expected[min(fitting)[1]].append(index)
        else:
            expected.append([index])
    assert list(pack(lengths, 10, "key")) == expected


# Buckets


def bucket_batches(sampler, size):
    indices = [index for _, index in sampler]
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def test_buckets_hold_similar_lengths_in_random_order():
    lengths = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0))
    sampler = BucketSampler(lengths, 10, seed=1)
    batches = bucket_batches(sampler, 10)
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert len(batches[-1]) == 3
    spread = [int(lengths[b].max() - lengths[b].min()) for b in batches[:-1]]
    plain = bucket_batches(EpochSampler(lengths, 1), 10)[:-1]
    assert sum(spread) < 0.1 * sum(int(lengths[b].max() - lengths[b].min()) for b in plain)
    # Batches are shuffled: the means of neighbours are not sorted.
    means = torch.stack([lengths[b].float().mean() for b in batches[:-1]])
    assert 0.3 < (means.diff() > 0).float().mean() < 0.7


def test_buckets_are_a_function_of_seed_and_epoch():
    lengths = torch.arange(100)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = BucketSampler(lengths, 4, seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            assert list(sampler) == orders[seed, epoch]
            assert {e for e, _ in orders[seed, epoch]} == {epoch}
    assert len({tuple(i for _, i in order) for order in orders.values()}) == 4


def test_replicas_share_buckets():
    lengths = torch.randint(1, 1000, (402,), generator=torch.Generator().manual_seed(0))
    shares = [BucketSampler(lengths, 5, 1, num_replicas=4, rank=rank) for rank in range(4)]
    batches = [bucket_batches(share, 5) for share in shares]
    assert {len(share) for share in batches} == {21}
    assert set(range(402)) == {i for share in batches for batch in share for i in batch}
    for step in range(20):
        together = [i for share in batches for i in share[step]]
        assert len(set(together)) == 20
        assert lengths[together].max() - lengths[together].min() < 200


def test_fewer_samples_than_a_batch():
    assert sorted(i for _, i in BucketSampler(torch.tensor([3, 1, 2]), 8, 0)) == [0, 1, 2]
