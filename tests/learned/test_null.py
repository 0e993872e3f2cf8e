"""Random updates beside learned functions keep the size of each group and the rank, and have no direction."""

import statistics

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import lit_adapters as la
from lit_adapters.errors import AdapterError
from lit_adapters.learned.null import random_change, ranks_against_random
from lit_adapters.lightning.subspace_null import SubspaceAgainstRandom
from lit_adapters.training.attached import adapter_layers
from tests.lightning.tiny_task import Task, loader, nora

GROUPS = 16


class WithTest(Task):
    def test_step(self, batch, batch_idx):
        self(batch[0])


def adapted(rank, update=torch.randn):
    """Two activations of 16 groups whose numerators moved by `update(groups, coefficients or rank)`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(GROUPS, GROUPS), nn.GELU(), nn.Linear(GROUPS, GROUPS), nn.GELU())
    la.attach(model, la.NoRA(groups=GROUPS, rank=rank, base="anchored"))
    layers = list(adapter_layers(model).values())
    for layer in layers:
        moved = layer.numerator_delta if rank is None else layer.numerator_B
        with torch.no_grad():
            moved.copy_(0.1 * update(*moved.shape))
    return layers


@pytest.mark.parametrize("rank", [None, 2])
def test_rank_and_group_norms_are_kept(rank, monkeypatch):
    (layer, _) = adapted(rank)
    seen = []
    monkeypatch.setattr(layer, "learned_change", lambda x, coefficients: seen.append(coefficients))
    random_change(layer, layer.grid(), torch.Generator().manual_seed(1))
    (a, b), (a0, b0) = seen[0], layer.base_coefficients()
    moved = (a - a0.double()) / layer.numerator_scale.double()
    learned = (layer.coefficients()[0].detach().double() - a0.double()) / layer.numerator_scale.double()
    torch.testing.assert_close(moved.norm(dim=1), learned.norm(dim=1), rtol=1e-5, atol=0)
    assert torch.linalg.matrix_rank(moved, rtol=1e-6) == (rank or moved.shape[1])
    assert not torch.allclose(moved, learned, rtol=0.1)
    torch.testing.assert_close(b, b0.double())  # what has not moved does not move


def test_an_update_without_direction_is_like_random_ones_and_one_with_a_direction_is_not():
    learned, random = ranks_against_random(adapted(None), draws=15)
    assert abs(learned - statistics.fmean(random)) < 3 * statistics.stdev(random)
    along = torch.randn(1, 99)
    learned, random = ranks_against_random(adapted(None, lambda g, k: torch.randn(g, 1) * along[:, :k]), draws=15)
    assert learned == pytest.approx(1, abs=1e-6)
    assert statistics.fmean(random) - learned > 3 * statistics.stdev(random)
    assert ranks_against_random(adapted(None), draws=2) == ranks_against_random(adapted(None), draws=2)


def test_the_callback_logs_what_is_computed():
    torch.manual_seed(0)
    task = WithTest(nora())
    layers = list(adapter_layers(task).values())
    with torch.no_grad():
        for layer in layers:
            layer.numerator_B.normal_()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    logged = Trainer(callbacks=[SubspaceAgainstRandom(3)], **options).test(task, loader(), verbose=False)[0]
    learned, random = ranks_against_random(layers, 3)
    assert logged["test/subspace_rank"] == pytest.approx(learned)
    assert logged["test/subspace_rank_excess"] == pytest.approx(learned - statistics.fmean(random), abs=1e-5)
    with pytest.raises(AdapterError, match="the model has none"):
        Trainer(callbacks=[SubspaceAgainstRandom()], **options).test(WithTest(la.LoRA()), loader(), verbose=False)
    with pytest.raises(AdapterError, match="draws 0 must be at least 1"):
        SubspaceAgainstRandom(0)
