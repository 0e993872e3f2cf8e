"""Two processes write to one adapter directory while another reads it: each reader sees one save, whole."""

import json
import multiprocessing
import time

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.files.adapters import CARD, HEADER, TENSORS
from lit_adapters.files.saved import read_saved

RANKS = (2, 3)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


def save_often(folder, rank, ready, until):
    """Save adapters of one rank, all values the rank, again and again."""
    torch.set_num_threads(1)
    model = base()
    la.attach(model, la.LoRA(rank=rank, targets=["0"]), train=["2"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(rank)
    la.save_adapters(model, folder)
    ready.set()
    while time.time() < until.value:
        la.save_adapters(model, folder)


@pytest.mark.slow
def test_a_reader_sees_one_save_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    until = context.Value("d", time.time() + 600)
    events = [context.Event() for _ in RANKS]
    writers = [
        context.Process(target=save_often, args=(tmp_path, rank, event, until))
        for rank, event in zip(RANKS, events, strict=True)
    ]
    for writer in writers:
        writer.start()
    assert all(event.wait(timeout=120) for event in events)
    until.value = time.time() + 8
    seen = dict.fromkeys(RANKS, 0)
    while time.time() < until.value - 1:
        model = base()
        la.load_adapters(model, tmp_path)
        values = {p.unique().item() for p in model.parameters() if p.requires_grad}
        rank = model[0].rank
        assert values == {rank}
        seen[rank] += 1
        (layer,) = read_saved(tmp_path).layers.values()
        assert {t.unique().item() for t in layer.tensors.values()} == {layer.adapter.rank}
        json.loads((tmp_path / HEADER).read_text())
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    assert min(seen.values()) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, HEADER, TENSORS]
