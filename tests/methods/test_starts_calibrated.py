"""LoRA and DoRA that start from gradients (LoRA-GA) or inputs (EVA), measured on batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_adapters as la

KINDS = [la.LoRA, la.DoRA]
each_kind = pytest.mark.parametrize("kind", KINDS)
BATCHES = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) * torch.arange(1, 13) + 2 for n in (30, 50)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def loss_of(network: nn.Module):
    return lambda x: (network(x) - x[:, :10]).square().mean()


def attached(kind=la.LoRA, start="lora_ga", train=(), **settings) -> Net:
    network = Net()
    la.attach(network, kind(**{"rank": 2, "alpha": 4.0, "start": start} | settings), train=train)
    return network


def calibrated(kind=la.LoRA, start="lora_ga", **settings) -> Net:
    network = attached(kind, start, **settings)
    la.calibrate(network, BATCHES, loss=loss_of(network))
    return network


# ---- LoRA-GA


@each_kind
def test_the_first_step_of_lora_ga_is_a_step_along_the_best_gradient_of_rank_2r(kind):
    """Its purpose: d(B A) = B0 dA + dB A0 is G without all but its 2 r largest singular values, times a constant."""
    network, plain = calibrated(kind).train(), Net()
    sum(loss_of(plain)(x) for x in BATCHES).backward()
    sum(loss_of(network)(x) for x in BATCHES).backward()
    for name, adapter in la.adapters(network):
        gradient = plain.get_submodule(name).weight.grad.double()
        a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
        step = adapter.scaling * (b @ adapter.lora_A.grad.double() + adapter.lora_B.grad.double() @ a)
        u, values, vh = torch.linalg.svd(gradient, full_matrices=False)
        best = u[:, :4] * values[:4] @ vh[:4]
        factor = adapter.scaling**2 * len(gradient) ** 0.5 / 16  # s^2 c^2
        torch.testing.assert_close(step, factor * best, rtol=1e-4, atol=1e-4 * step.abs().max().item())


@each_kind
@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_the_start_is_the_pretrained_model_bit_for_bit(kind, start):
    network, plain = calibrated(kind, start), Net()
    for x in BATCHES:
        assert torch.equal(network(x), plain(x))
    assert all(bool(a.calibrated) and not a.awaits_calibration for _, a in la.adapters(network))
    loss_of(network)(BATCHES[0]).backward()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert not torch.equal(network(BATCHES[0]), plain(BATCHES[0]))


def test_measuring_gradients_leaves_no_trace():
    network = attached(train=["fc2.bias"])
    network.fc2._parameters["bias"].grad = torch.ones(10)
    required = {n: p.requires_grad for n, p in network.named_parameters()}
    la.calibrate(network, BATCHES, loss=loss_of(network))
    assert {n: p.requires_grad for n, p in network.named_parameters()} == required
    assert {n for n, p in network.named_parameters() if p.grad is not None} == {"fc2.bias"}
    assert torch.equal(network.fc2._parameters["bias"].grad, torch.ones(10))
    assert network.training
    assert not network.fc1._parameters["weight"]._post_accumulate_grad_hooks


def test_a_tied_weight_starts_from_the_gradient_of_its_own_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.middle(self.embedding(ids)))

    ids = torch.arange(8)

    def loss(model):
        return nn.functional.cross_entropy(model(ids), ids + 5)

    tied, apart = Tied(), Tied()
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    for model in (tied, apart):
        la.attach(model, la.LoRA(rank=2, start="lora_ga", targets=["head"]))
        la.calibrate(model, [None], loss=lambda _, model=model: loss(model))
    assert torch.equal(tied.head.lora_A, apart.head.lora_A)
    assert torch.equal(tied.head.lora_B, apart.head.lora_B)
    assert tied.head.weight is tied.embedding.weight


def test_convolutions_start_from_their_gradient_as_a_matrix():
    base, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)
    network = nn.Sequential(copy.deepcopy(base))
    la.attach(network, la.LoRA(rank=2, targets=["0"], start="lora_ga"))
    la.calibrate(network, [x], loss=lambda x: network(x).square().mean())
    base(x).square().mean().backward()
    right = torch.linalg.svd(base.weight.grad.flatten(1))[2][:2]
    cosines = F.cosine_similarity(network[0].lora_A, right).abs()
    torch.testing.assert_close(cosines, torch.ones(2))


# ---- EVA


@each_kind
def test_eva_takes_the_principal_directions_of_the_inputs(kind):
    network, plain = attached(kind, "eva"), Net()
    la.calibrate(network, BATCHES)
    rows = torch.cat(BATCHES).double()
    for adapter, seen in ((network.fc1, rows), (network.fc2, torch.tanh(plain.double().fc1(rows)))):
        exact = torch.linalg.svd(seen - seen.mean(0))[2][:2]
        cosines = (adapter.lora_A.double() * exact).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)
        assert not adapter.lora_B.any()
        assert adapter.update_rank == 2


def test_eva_exports_and_decays_as_lora_does(tmp_path):
    peft = pytest.importorskip("peft")
    network = attached(start="eva")
    la.calibrate(network, BATCHES)
    with torch.no_grad():
        network.fc1.lora_B.normal_()
    assert not network.fc1.undecayed_parameters()
    la.export_peft(network, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(BATCHES[0]), network(BATCHES[0]))
    assert theirs.base_model.model.fc1.r["default"] == 2


# ---- both


@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_files_keep_the_start_and_do_not_ask_for_another_calibration(start, tmp_path):
    network = calibrated(start=start)
    with torch.no_grad():
        for _, adapter in la.adapters(network):
            adapter.lora_B.add_(0.1)
    la.save_adapters(network, tmp_path)
    loaded = Net()
    la.load_adapters(loaded, tmp_path)
    loaded.train()
    y = loaded(BATCHES[0])
    assert torch.equal(y, network(BATCHES[0]))
    assert not any(a.awaits_calibration for _, a in la.adapters(loaded))
    with pytest.raises(la.AdapterError, match="'fc1' has been trained: calibrating now would change its function"):
        la.calibrate(loaded, BATCHES, loss=loss_of(loaded))
    assert torch.equal(loaded(BATCHES[0]), y)


@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_training_without_calibration_is_refused(start):
    network, plain = attached(start=start).train(), Net()
    call = r"calibrate\(model, batches, loss=...\)" if start == "lora_ga" else r"calibrate\(model, batches\)"
    with pytest.raises(la.AdapterError, match=f"'fc1' has start='{start}' and was not calibrated; call .*{call}"):
        network(BATCHES[0])
    assert torch.equal(network.eval()(BATCHES[0]), plain(BATCHES[0]))


def test_methods_of_both_kinds_are_measured_in_one_pass():
    network, calls = Net(), []
    la.attach(
        network, [la.LoRA(rank=2, targets=["fc1"], start="lora_ga"), la.DoRA(rank=2, targets=["fc2"], start="eva")]
    )

    def loss(x: Tensor) -> Tensor:
        calls.append(len(x))
        return loss_of(network)(x)

    la.calibrate(network, BATCHES, loss=loss)
    assert calls == [30, 50]
    assert network.fc1.start_B.any()
    assert torch.equal(network.fc2.lora_A, attached_eva().fc2.lora_A)


def attached_eva() -> Net:
    network = attached(la.DoRA, "eva")
    la.calibrate(network, BATCHES)
    return network


def test_what_cannot_start_so_is_refused():
    network = attached()
    with pytest.raises(la.AdapterError, match="'fc1' starts from the gradient of its weight; give calibrate the loss"):
        la.calibrate(network, BATCHES)
    with pytest.raises(la.AdapterError, match="no gradient reached the weight of 'fc2'"):
        la.calibrate(network, BATCHES, loss=lambda x: network.fc1(x).sum())
    with pytest.raises(la.AdapterError, match="the gradient of the weight of 'fc1' is zero or not finite"):
        la.calibrate(network, BATCHES, loss=lambda x: 0 * network(x).sum())
    with pytest.raises(la.AdapterError, match=r"takes 2 \* 6 directions of the gradient, and 'fc2' \(10 x 16\) has 10"):
        attached(rank=6, targets=["fc2"])
    with pytest.raises(la.AdapterError, match=r"needs 2 directions .* 'fc1' vary, and 2 rows of the calibration"):
        la.calibrate(attached(start="eva"), [BATCHES[0][:2]])
    with pytest.raises(la.AdapterError, match="the inputs of 'fc1' are not finite"):
        la.calibrate(attached(start="eva"), [torch.full((5, 12), float("nan"))])
    with pytest.raises(la.AdapterError, match="reads the inputs of linear layers, and '0' is a convolution"):
        la.attach(nn.Sequential(nn.Conv2d(4, 8, 3)), la.LoRA(rank=2, targets=["0"], start="eva"))
    network = attached(start="eva")
    network.fc1.sharded = True
    with pytest.raises(la.AdapterError, match=r"'fc1' is sharded, and start=.* needs whole matrices"):
        la.calibrate(network, BATCHES)


def test_a_quantised_weight_has_no_gradient():
    pytest.importorskip("bitsandbytes")
    from tests.methods.quantised import inputs, network

    with pytest.raises(la.AdapterError, match="needs the gradient of the weight of '0', which is quantised"):
        la.attach(network(), la.LoRA(rank=4, start="lora_ga"))
    model, x = network(), inputs()
    expected = model(x)
    la.attach(model, la.LoRA(rank=4, start="eva"))
    la.calibrate(model, [x])
    assert torch.equal(model(x), expected)
