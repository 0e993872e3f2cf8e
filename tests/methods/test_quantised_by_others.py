"""Layers that other libraries quantised are refused by name, whatever form their weight has."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

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
METHODS = [la.LoRA(rank=2), la.DoRA(rank=2), la.LoRAN(rank=2), la.AFALoRA(rank=2), la.VeRA(rank=4)]
METHODS.append(la.BitFit(add_missing=True))
X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_anything_changes(case):
    change, words = CASES[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), change(nn.Linear(8, 8, bias=False)))
    modules = list(model)
    for method in METHODS:
        for targets in (method.targets, ["2"], "[02]"):
            chosen = copy.copy(method)
            chosen.targets = targets
            with pytest.raises(
                la.AdapterError, match=rf"'2'.* {words}.*NF4 .4 bit. with bitsandbytes.*exclude=\['2'\]"
            ):
                la.attach(model, chosen)
    assert list(model) == modules


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
