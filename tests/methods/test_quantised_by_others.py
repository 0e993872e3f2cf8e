"""Layers that other libraries quantised: methods that read the weight are refused by name, others work."""

import copy

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lit_adapters as la
from lit_adapters.methods.quantised import foreign_quantisation


class Int8Tensor(torch.Tensor):
    """A weight that claims to be float, and computes nothing but a linear layer, as those of torchao."""

    qdata: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, qdata, scale):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata, scale):
        self.qdata, self.scale = qdata, scale

    def dequantize(self):
        return self.qdata * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].dequantize(), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].qdata, args[0].scale)
        raise NotImplementedError(f"Int8Tensor dispatch: unimplemented {function}")


def with_tensor(layer):
    scale = layer.weight.detach().abs().max() / 127
    qdata = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Int8Tensor(qdata, scale), requires_grad=False)
    return layer


def with_dtype(dtype):
    def change(layer):
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        return layer

    return change


class QLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(), self.bias)


class HQQLinear(nn.Module):
    """Not an nn.Linear, as the layers of HQQ, GPTQ and AWQ are."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None
        self.register_buffer("values", layer.weight.detach().half())

    def forward(self, x):
        return nn.functional.linear(x, self.values.to(x.dtype))


class Packed(nn.Module):
    """A class whose name says nothing, with the old names of GPTQ."""

    def __init__(self, layer):
        super().__init__()
        self.infeatures, self.outfeatures = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.detach().half())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype))


CASES = {
    "torchao": (with_tensor, "a Linear whose weight is a Int8Tensor of "),
    "float8": (with_dtype(torch.float8_e4m3fn), "a Linear whose weight is of torch.float8_e4m3fn"),
    "int8": (with_dtype(torch.int8), "a Linear whose weight is of torch.int8"),
    "quanto": (lambda layer: QLinear(8, 8), "a QLinear of "),
    "hqq": (HQQLinear, "a HQQLinear of "),
    "gptq": (Packed, "a Packed that holds 'qweight' in place of a weight"),
}
# Those that read the weight, and those that only call the layer.
READING = [la.DoRA(rank=2), la.LoRAN(rank=2), la.NestedLoRA(rank=2, inner_rank=2), la.LoRA2(width=2, rank=2)]
READING += [la.BitFit(add_missing=True), la.LoRA(rank=2, start="pissa")]
CALLING = [la.LoRA(rank=2), la.AFALoRA(rank=2), la.VeRA(rank=4), la.LoRA(rank=2, start="eva")]
X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.mark.parametrize("case", CASES)
def test_methods_that_read_the_weight_are_refused_before_anything_changes(case):
    change, words = CASES[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), change(nn.Linear(8, 8, bias=False)))
    modules = list(model)
    for method in READING:
        for targets in (method.targets, ["2"], "[02]"):
            chosen = copy.copy(method)
            chosen.targets = targets
            with pytest.raises(la.AdapterError, match=rf"'2'.* {words}.*exclude=\['2'\]"):
                la.attach(model, chosen)
    assert list(model) == modules


@pytest.mark.filterwarnings("ignore:.*still nonlinear:UserWarning")
@pytest.mark.parametrize("method", CALLING, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'start', '')}")
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("float8", "int8")])
def test_methods_that_call_the_layer_train_and_load(case, method, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), CASES[case][0](nn.Linear(8, 8, bias=False)))
    before, base = model(X), copy.deepcopy(model)
    report = la.attach(model, method)
    la.calibrate(model, [torch.randn(9, 8)])  # for EVA
    assert "2" in [name for name, *_ in report.adapters]
    assert_close(model(X), before, rtol=0, atol=0)
    model(X).square().sum().backward()
    move(model)
    adapted = model(X)
    assert not torch.allclose(adapted, before)
    adapter = model[2]
    statistics = adapter.statistics()
    assert ("relative_norm" if adapter.layer.can_read else "norm") in statistics
    assert all(value == value for value in statistics.values())
    with la.disabled(model):
        assert_close(model(X), before, rtol=0, atol=0)
    la.save_adapters(model, tmp_path)
    la.load_adapters(base, tmp_path)
    assert_close(base(X), adapted, rtol=0, atol=0)
    la.set_progress(model, 1.0)
    linear = model(X)
    if not adapter.layer.can_read:
        with pytest.raises(la.AdapterError, match=r"the weight of '2', .* cannot be read; keep the adapter"):
            la.merge(model)
        return
    assert la.merge(model).dequantised == ["2"]
    assert type(model[2]) is nn.Linear
    assert_close(model(X), linear, rtol=1e-5, atol=1e-5)


def test_the_packed_weights_of_a_base_are_not_its_statistics(tmp_path):
    """A file holds adapters and running statistics, and leaves the packed base alone; another base is noticed."""

    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), CASES["gptq"][0](nn.Linear(8, 8, bias=False)))

    model = network(0)
    packed = model[2].qweight
    la.attach(model, la.LoRA(rank=2), name="first")
    la.attach(model, la.LoRA(rank=2), name="second")
    la.use(model, "second")
    assert model[2].qweight is packed  # no copy for each set
    la.save_adapters(model, tmp_path)
    saved = load_file(tmp_path / "lit_adapter.safetensors")
    assert "1.running_mean" in saved
    assert not any("qweight" in name for name in saved)
    other = network(1)
    before = other[2].qweight.clone()
    with pytest.warns(UserWarning, match=r"trained on other weights .*'0.bias' and 2 more"):
        la.load_adapters(other, tmp_path)
    assert torch.equal(other[2].qweight, before)


def move(model):
    """Give the adapters other values; each must have had a gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                assert parameter.grad is not None
                parameter += 0.1 * torch.randn_like(parameter)


def eight_bit():
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(32, 64), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def by_torchao(dtype):
    layer = nn.Sequential(nn.Linear(64, 32, dtype=dtype))
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0]


@pytest.mark.filterwarnings("ignore:.*still nonlinear:UserWarning")
@pytest.mark.parametrize("method", CALLING, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'start', '')}")
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (eight_bit, torch.float32),
        (lambda: by_torchao(torch.float32), torch.float32),
        (lambda: by_torchao(torch.bfloat16), torch.bfloat16),
    ],
    ids=["bitsandbytes, 8 bit", "torchao, float32", "torchao, bfloat16"],
)
def test_real_layers(make, dtype, method):
    """The adapter adds to what the layer returns, and gradients reach the input."""
    torch.manual_seed(0)
    model = nn.Sequential(make())
    x = torch.randn(4, 64, dtype=dtype)
    before = model(x)
    la.attach(model, method)
    la.calibrate(model, [x])  # for EVA
    assert_close(model(x), before, rtol=0, atol=0)
    model(x).float().square().sum().backward()
    move(model)
    la.set_progress(model, 1.0)
    x.requires_grad_(True)
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad.abs().sum() > 0
    update = model[0].delta_weight(torch.float64)
    expected = before.double() + x.detach().double() @ update.T
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(y.detach().double(), expected, rtol=error, atol=error * expected.abs().max().item())
    assert la.merge(model).dequantised == ["0"]
    assert type(model[0]) is nn.Linear
    assert (model(x) - y).abs().max() / y.abs().max() < 3e-2  # 8-bit layers round their inputs too


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("float8", "int8")])
def test_what_does_not_read_it_works_from_attach_to_merge(case, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), CASES[case][0](nn.Linear(8, 8, bias=False)))
    plain, base = model(X), copy.deepcopy(model)
    la.attach(model, [la.NoRA(groups=4, base="anchored"), la.LoRA(rank=2, exclude=["2"])])
    assert_close(model(X), plain)
    model(X).square().sum().backward()
    trained = [p for _, a in la.adapters(model) for p in a.adapter_parameters().values()]
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
    adapted = model(X)
    la.save_adapters(model, tmp_path)
    la.merge(model)
    assert_close(model(X), adapted)
    la.load_adapters(base, tmp_path)
    assert_close(base(X), adapted)


class QuantileLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        nn.Linear(2, 2, dtype=torch.complex64),
        nn.Linear(2, 2, dtype=torch.float16),
        nn.Conv2d(2, 2, 1),
        QuantileLinear(2, 2),
        nn.LazyLinear(2),
        nn.MultiheadAttention(2, 1).out_proj,
        nn.Embedding(2, 2),
        nn.LayerNorm(2),
        nn.GELU(),
    ],
)
def test_ordinary_modules_are_not_taken_for_quantised(module):
    assert foreign_quantisation(module) == ""
