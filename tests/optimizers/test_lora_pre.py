"""LoRA-Pre: the identities of its factors, its steps, what it keeps, and where it is AdamW."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.optimizers import LoRAPre
from lit_adapters.optimizers.lora_pre import next_factors
from tests.lightning.tiny_task import Net


def matrix(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(optimizer, weight, gradient):
    weight.grad = gradient.clone()
    optimizer.step()


KEEP = 0.9**0.5


def test_square_factors_that_move_in_turn_are_the_exact_moment():
    b, a = torch.zeros(6, 6, dtype=torch.float64), matrix(6, 6, seed=1)
    moment = b @ a
    for seed in range(5):
        gradient = matrix(6, 6, seed=seed) + 4 * torch.eye(6)
        b, a = next_factors(b, a, gradient, KEEP, "sequential", 0.0)
        moment = 0.9 * moment + 0.1 * gradient
        torch.testing.assert_close(b @ a, moment, rtol=1e-9, atol=1e-9)


def test_square_factors_that_move_together_have_the_published_product():
    b, a = matrix(6, 6, seed=1), matrix(6, 6, seed=2)
    gradient, g = matrix(6, 6, seed=3), 1 - KEEP
    moment = b @ a
    b, a = next_factors(b, a, gradient, KEEP, "simultaneous", 0.0)
    want = 0.9 * moment + 2 * g * (1 - g) * gradient + g**2 * gradient @ torch.linalg.inv(moment) @ gradient
    torch.testing.assert_close(b @ a, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_the_first_step_from_zero(order):
    weight = nn.Parameter(matrix(9, 7, seed=0))
    optimizer = LoRAPre([weight], lr=0.0, rank=3, damping=0.0, order=order)
    before, gradient = weight.detach().clone(), matrix(9, 7, seed=1)
    step(optimizer, weight, torch.zeros_like(gradient))  # makes the state; the factors b stay at zero
    state = optimizer.state[weight]
    assert not state["first_b"].any()
    a = state["first_a"].clone()
    step(optimizer, weight, gradient)
    g, b = 1 - KEEP, state["first_b"]
    torch.testing.assert_close(b, g * gradient @ torch.linalg.pinv(a))
    follows = g * torch.linalg.pinv(b) @ gradient if order == "sequential" else 0.0
    torch.testing.assert_close(state["first_a"], KEEP * a + follows)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("second", ["corrected", "published"])
def test_a_step_follows_the_equations(second):
    """The third step, from the factors that the optimiser holds by then."""
    weight = nn.Parameter(matrix(9, 7, seed=0))
    optimizer = LoRAPre([weight], lr=0.1, betas=(0.9, 0.99), rank=3, eps=1e-3, weight_decay=0.5, second=second)
    for seed in (1, 2):
        step(optimizer, weight, matrix(9, 7, seed=seed))
    state, before, gradient = optimizer.state[weight], weight.detach().clone(), matrix(9, 7, seed=3)
    m = 0.9 * state["first_b"] @ state["first_a"] + 0.1 * gradient
    mean = state["second_b"] @ state["second_a"]
    v = 0.99 * mean**2 + 0.01 * gradient**2
    if second == "corrected":  # a mean of squares: of the mean of |G| over two steps, and of this gradient
        v = 0.99 * (1 - 0.99**2) * (mean / (1 - 0.99)) ** 2 + 0.01 * gradient**2
    step(optimizer, weight, gradient)
    want = before - 0.1 * (m / (1 - 0.9**3) / ((v / (1 - 0.99**3)).sqrt() + 1e-3) + 0.5 * before)
    torch.testing.assert_close(weight.detach(), want)


def test_the_corrected_second_moment_is_near_adams_and_the_published_one_is_not():
    """|G| is the same in all steps and of rank one. AdamW moves by lr in each; the random first factors fade slowly."""
    size = matrix(9, 1, seed=0).abs() @ matrix(1, 7, seed=1).abs()
    moved = {}
    for second in ("corrected", "published"):
        weight = nn.Parameter(torch.zeros(9, 7, dtype=torch.float64))
        optimizer = LoRAPre([weight], lr=1 / 40, rank=1, weight_decay=0.0, second=second)
        for _ in range(40):
            step(optimizer, weight, size)
        moved[second] = weight.detach().abs()
    assert (moved["corrected"] - 1).abs().max() < 0.7
    assert moved["published"].min() > 2


def test_the_loss_may_have_any_scale():
    paths = []
    for factor in (1.0, 1e-4, 1e4):
        weight = nn.Parameter(matrix(9, 7, seed=0))
        optimizer = LoRAPre([weight], lr=0.1, rank=3, eps=0.0)
        for seed in range(6):
            step(optimizer, weight, factor * matrix(9, 7, seed=seed))
        paths.append(weight.detach())
    torch.testing.assert_close(paths[0], paths[1])
    torch.testing.assert_close(paths[0], paths[2])


def test_small_matrices_and_vectors_get_adamw_and_the_state_is_small():
    shapes = [(9, 3), (5,), (2, 3, 4), (9, 7)]
    ours, plain = ([nn.Parameter(matrix(*shape, seed=0)) for shape in shapes] for _ in range(2))
    first, second = LoRAPre(ours, lr=0.1, rank=3), torch.optim.AdamW(plain, lr=0.1)
    for seed in range(3):
        for p in (*ours, *plain):
            p.grad = matrix(*p.shape, seed=seed)
        first.step()
        second.step()
    assert all(torch.equal(x, y) for x, y in zip(ours[:3], plain[:3], strict=True))
    kept = [v.numel() for name, v in first.state[ours[3]].items() if name != "step"]
    assert sum(kept) == 2 * (9 + 7) * 3


def test_a_gradient_of_zero_changes_nothing():
    weight = nn.Parameter(matrix(9, 7, seed=0))
    before = weight.detach().clone()
    optimizer = LoRAPre([weight], lr=0.1, rank=3, weight_decay=0.0)
    for _ in range(3):
        step(optimizer, weight, torch.zeros_like(before))
    assert torch.equal(weight, before)


def test_a_resumed_full_fine_tuning_is_the_uninterrupted_one():
    x, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), labels))
            losses[-1].backward()
            optimizer.step()
        return [loss.item() for loss in losses]

    whole, half = Net(), Net()
    path = train(whole, LoRAPre(whole.parameters(), lr=1e-2, rank=2), 6)
    assert path[-1] < 0.9 * path[0]
    optimizer = LoRAPre(half.parameters(), lr=1e-2, rank=2)
    train(half, optimizer, 3)
    again = Net()
    again.load_state_dict(half.state_dict())
    resumed = LoRAPre(again.parameters(), lr=0.5, rank=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert train(again, resumed, 3) == path[3:]


def test_a_damaged_state_is_refused():
    model = Net()
    optimizer = LoRAPre(model.parameters(), rank=2)
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    state = optimizer.state_dict()
    del next(entry for entry in state["state"].values() if "first_a" in entry)["first_a"]
    with pytest.raises(la.AdapterError, match=r"the state of LoRAPre for parameter \d+ holds"):
        LoRAPre(Net().parameters(), rank=2).load_state_dict(state)


def test_wrong_settings_are_refused():
    weight = nn.Parameter(torch.ones(9, 7))
    for settings in ({"rank": 0}, {"order": "paper"}, {"second": "exact"}, {"damping": -1.0}):
        with pytest.raises(la.AdapterError, match=next(iter(settings))):
            LoRAPre([weight], **settings)
    weight.full_tensor = lambda: weight  # as a DTensor has
    with pytest.raises(la.AdapterError, match="LoRAPre needs whole matrices"):
        LoRAPre([weight])
