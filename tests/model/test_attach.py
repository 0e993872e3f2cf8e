"""Attaching to odd models: any nn.Module, shared layers, half-frozen bases, LightningModules, and what is refused."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lit_adapters as la
from tests.matrix import METHODS, build


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build("vit")

    def forward(self, x):
        return self.net(x)


def test_a_plain_sequential():
    model = mlp()
    la.attach(model, la.NoRA(groups=2))
    assert model(torch.randn(3, 4)).shape == (3, 2)
    assert [name for name, _ in la.adapters(model)] == ["1"]


def test_a_lightning_module():
    module, x = Lit(), torch.randn(1, 3, 32, 32)
    expected = module(x)
    report = la.attach(module, METHODS["nora++"], train=["head"])
    assert set(report.head) == {"net.head.weight", "net.head.bias"}
    assert all(n.startswith("net.") for n, _ in la.adapters(module))
    assert (module(x) - expected).abs().max() < 0.1
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    module.load_state_dict({k: v for k, v in module.state_dict().items() if k not in frozen})
    module.half()
    assert module(x.half()).dtype == torch.float16


def test_a_part_may_be_adapted_and_the_whole_says_so():
    module = Lit()
    la.attach(module.net, la.LoRA(rank=2))
    assert len(list(la.adapters(module))) == 8
    for call in (lambda: la.save_adapters(module, "nowhere"), lambda: la.merge(module), lambda: la.detach(module)):
        with pytest.raises(la.AdapterError, match="Lit has no adapters of its own; give its part 'net'"):
            call()
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.attach(module, la.LoRA(rank=2))


@pytest.mark.parametrize("methods", [None, []])
def test_without_a_method_the_model_is_frozen(methods):
    model = build("vit")
    report = la.attach(model, methods, train=["head"])
    assert report.adapters == []
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_methods_as_configurations():
    model = build("vit")
    la.attach(model, [{"class_path": "lit_adapters.LoRA", "init_args": {"rank": 2}}, la.NoRA(groups=4)])
    assert {a.method for _, a in la.adapters(model)} == {"lora", "nora"}


# ---- layers that stand at several places


def conv_then_linear() -> nn.Sequential:
    """One activation object after a convolution and after a linear layer."""
    act = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Flatten(), nn.Linear(32, 8), act, nn.Linear(8, 2))


def test_a_shared_activation_is_adapted_at_each_place_for_itself():
    model, x = conv_then_linear(), torch.randn(2, 3, 4, 4)
    act, expected = model[1], model(x)
    la.attach(model, la.NoRA(groups=4, base="anchored", targets=["1", "4"]))
    adapters = dict(la.adapters(model))
    assert {n: a.channel_dim for n, a in adapters.items()} == {"1": -3, "4": -1}
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        adapters["1"].numerator_B.add_(0.5)
    assert not adapters["4"].numerator_B.any()
    model(x).sum().backward()
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x), model(x))
        la.detach(duplicate)
        assert duplicate[1] is duplicate[4]
    la.detach(model)
    assert model[1] is model[4] is act
    assert act.inplace
    assert torch.equal(model(x), expected)


def test_a_shared_activation_that_is_excluded_at_one_place_stays_itself_there():
    model = conv_then_linear()
    act = model[1]
    la.attach(model, la.NoRA(groups=4, targets=["1", "4"], exclude=["4"]))
    assert model[4] is act
    assert act.inplace
    assert not list(act.parameters())


def test_a_shared_linear_layer_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.GELU(), shared)
    la.attach(model, la.LoRA(rank=2))
    assert model[0] is model[2]
    assert len(list(la.adapters(model))) == 1
    with torch.no_grad():
        model[0].lora_B.normal_()
    x = torch.randn(3, 4)
    expected = model(x)
    report = la.merge(model)
    assert report.merged == ["0"]
    assert model[0] is model[2] is shared
    torch.testing.assert_close(model(x), expected)


def test_a_shared_linear_layer_is_not_given_to_two_methods():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.GELU(), shared)
    with pytest.raises(la.AdapterError, match=r"'.' and '2' are one and the same layer"):
        la.attach(model, [la.LoRA(rank=2, targets=["0"]), la.LoRA(rank=3, targets=["2"])])
    assert not list(la.adapters(model))


# ---- parameters


def test_what_was_frozen_stays_so_after_detach():
    model = mlp()
    model[0].bias.requires_grad_(False)
    la.attach(model, la.LoRA(rank=2), train=["2"])
    la.detach(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"0.bias"}


def test_train_takes_parameters_and_regular_expressions():
    model = build("vit")
    report = la.attach(model, la.LoRA(rank=2), train=r".*\.bias")
    assert set(report.trained) | set(report.head) == {n for n, _ in build("vit").named_parameters() if "bias" in n}
    assert set(report.head) == {"head.bias"}
    model = build("vit")
    la.attach(model, la.LoRA(rank=2), train=["cls_token", "norm"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {"cls_token", "norm.weight", "norm.bias"}


def test_a_trained_layer_may_carry_an_adapter_as_well():
    model, x = mlp(), torch.randn(5, 4)
    la.attach(model, la.LoRA(rank=2, targets=["0"]), train=["0.bias"])
    model(x).sum().backward()
    assert model[0].bias.grad.any()
    assert model[0].weight.grad is None


def test_buffers_of_the_frozen_base_are_kept_with_the_adapters(tmp_path):
    """Running statistics move while a frozen base trains."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))

    model, loaded, x = network(), network(), torch.randn(16, 4)
    la.attach(model, la.NoRA(groups=2))
    for _ in range(3):
        model.train()(x)
    la.save_adapters(model, tmp_path)
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("ignored", [3, la.LoRA, "lora", [None]])
def test_what_is_no_method_is_refused_before_anything_happens(ignored):
    model = mlp()
    with pytest.raises(la.AdapterError):
        la.attach(model, ignored)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_wrapped_for_several_processes(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8)))
        with pytest.raises(la.AdapterError, match="DistributedDataParallel is wrapped for several processes already"):
            la.attach(model, la.LoRA(rank=2))
    finally:
        torch.distributed.destroy_process_group()
