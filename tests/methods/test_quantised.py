"""Adapters on a base quantised to 4 bit by bitsandbytes: the pretrained function, gradients, and repacking."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lit_adapters as la
from tests.methods.quantised import (
    HALF,
    METHODS,
    WIDE,
    adapted,
    bnb,
    content,
    dequantised,
    error,
    every_method,
    inputs,
    layer,
    move,
    nesting,
    network,
)

# The start


@nesting
@every_method
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=["float32", "bfloat16"])
def test_the_start_is_the_quantised_model_bit_for_bit(method, dtype, autocast, nested):
    model, x = network(nested=nested, stored=dtype, compute=dtype), inputs(dtype)
    with torch.autocast("cpu", HALF, enabled=autocast):
        expected = model(x)
        la.attach(model, METHODS[method])
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected)
        move(model)
        assert not torch.equal(model(x), expected)
        with la.disabled(model):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("stored", "compute", "given"),
    [(HALF, WIDE, HALF), (WIDE, HALF, WIDE), (HALF, HALF, WIDE), (HALF, None, WIDE)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@every_method
def test_the_start_where_the_layer_computes_in_a_dtype_of_its_own(method, stored, compute, given, dropout):
    model, x = network(stored=stored, compute=compute), inputs(given)
    expected = copy.deepcopy(model)(x)
    la.attach(model, dataclasses.replace(METHODS[method], dropout=dropout))
    y = model(x)
    assert torch.equal(y, expected)
    assert y.dtype == given


# Values and gradients


def reference(adapter: nn.Module, weight: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The method by its formula, float64."""
    bias = adapter.bias.detach().double()
    if adapter.method == "vera":
        a, b = adapter.vera_A.double(), adapter.vera_B.double()
        return x @ weight.T + bias + p["vera_lambda_b"] * (p["vera_lambda_d"] * (x @ a.T) @ b.T)
    if adapter.method == "lora2":
        update = p["outer_up"] @ p["inner_up"] @ torch.diag(p["directions"]) @ p["inner_down"] @ p["outer_down"]
        return x @ (weight + adapter.scaling * update).T + bias
    s, product = 2.0, p["lora_B"] @ p["lora_A"]
    if adapter.method == "afa":
        code, beta = x @ p["lora_A"].T, adapter.beta.double()
        return x @ weight.T + bias + s * (beta * F.silu(code) + (1 - beta) * code) @ p["lora_B"].T
    if adapter.method == "loran":
        changed = weight + s * (product + 0.5 * product * torch.sin(20.0 * product))
    else:
        changed = weight + s * product
    if adapter.method == "dora":
        changed = p["magnitude"][:, None] * changed / changed.detach().norm(dim=1, keepdim=True)
    return x @ changed.T + bias


@nesting
@every_method
@pytest.mark.parametrize(("dtype", "tolerance"), [(WIDE, 1e-6), (HALF, 1e-2)], ids=["float32", "bfloat16"])
def test_values_and_gradients(method, dtype, tolerance, nested):
    model = nn.Sequential(layer(nested=nested, stored=dtype, compute=dtype))
    la.attach(model, METHODS[method])
    la.set_progress(move(model), 0.15)  # beta = 1/2
    adapter = model[0]
    x, upstream = inputs(dtype).requires_grad_(), torch.randn(2, 5, 64).to(dtype)
    own = adapter.adapter_parameters()
    y = model(x)
    gradients = torch.autograd.grad((y * upstream).sum(), [x, *own.values()])

    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    exact_y = reference(adapter, dequantised(adapter.weight), exact_x, exact)
    expected = torch.autograd.grad((exact_y * upstream.double()).sum(), [exact_x, *exact.values()])
    errors = {"y": error(y, exact_y)} | {
        name: error(g, e) for name, g, e in zip(["x", *own], gradients, expected, strict=True)
    }
    assert max(errors.values()) <= tolerance, errors
    assert [g.dtype for g in gradients] == [dtype, *[WIDE] * len(own)]


def test_loran_keeps_nothing_of_the_size_of_the_weight():
    model = nn.Sequential(layer())
    la.attach(model, METHODS["loran"])
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = model(inputs().requires_grad_())
    assert len(saved) >= 4
    assert max(saved) <= 10 * 128  # the input; the weight has 64 * 128
    function = y.grad_fn.next_functions[0][0]  # the output is a view of what it returned
    held = [value for value in vars(function).values() if isinstance(value, Tensor)]
    assert held
    assert all(value is model[0].weight for value in held)


@every_method
@pytest.mark.parametrize("storage", [torch.uint8, HALF], ids=["uint8", "bfloat16"])
def test_gradients_survive_checkpointing_and_hooks_on_saved_tensors(method, storage):
    model, x = adapted(method, storage=storage), inputs().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), [x, *trained])

    expected = gradients(model(x))
    again = gradients(checkpoint(model, x, use_reentrant=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        offloaded = gradients(model(x))
    for other in (again, offloaded):
        assert all(torch.equal(g, e) for g, e in zip(other, expected, strict=True))


# The repacking of bitsandbytes on processors with AVX512-bf16


def repack(linear: nn.Module) -> None:
    """What its forward does on such a processor, in eval mode and without gradients."""
    pack = bnb.functional._convert_weight_packed_for_cpu
    linear.weight.data, linear.weight.quant_state = pack(linear.weight.data, linear.weight.quant_state)


@nesting
@pytest.mark.parametrize("storage", [torch.uint8, HALF], ids=["in-uint8", "in-bfloat16"])
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=["float32", "bfloat16"])
def test_attach_undoes_earlier_repacking(dtype, storage, nested):
    linear, x = layer(nested=nested, stored=dtype, compute=dtype, storage=storage), inputs(dtype)
    before, packed, state = dequantised(linear.weight), content(linear.weight), linear.weight.quant_state
    repack(linear)
    assert error(bnb.functional.dequantize_4bit(linear.weight.data, state), before) > 0.5
    model = nn.Sequential(linear)
    la.attach(model, METHODS["loran"])
    weight = model[0].weight
    assert torch.equal(content(weight), packed)
    assert (weight.dtype, weight.quant_state.dtype, weight.quant_state.nested) == (storage, dtype, nested)
    # bitsandbytes has rounded the scales to bfloat16, and quantised them once more where they were.
    assert error(dequantised(weight), before) <= (2**-7 if nested else 2**-8)
    after = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert error(after, dequantised(weight)) <= (1e-6 if dtype == WIDE else 2**-8)
    with la.disabled(model):
        base = model(x)
    assert torch.equal(F.linear(x, after, model[0].bias), base)
    assert torch.equal(model(x), base)


@every_method
def test_an_evaluation_leaves_the_weight_and_later_gradients_alone(method):
    model, x = network(), inputs().requires_grad_()
    plain = layer()
    for linear in (plain, model[0], model[2]):
        linear.support_avx512bf16_for_cpu = True  # as on a processor that has it
    with torch.no_grad():
        bnb.nn.Linear4bit.forward(plain.eval(), inputs())
    assert plain.weight.quant_state.packing_format_for_cpu, "bitsandbytes no longer repacks: the cure may go"

    la.attach(model, METHODS[method])
    move(model)

    def look() -> tuple[Tensor, ...]:
        model.train()
        return (*torch.autograd.grad(model(x).square().sum(), x), dequantised(model[0].weight), model[0].base_matrix())

    before = look()
    with torch.no_grad():
        expected = model.eval()(inputs())
        assert torch.equal(model(inputs()), expected)
        with la.disabled(model):
            model(inputs())
    assert all(torch.equal(a, b) for a, b in zip(look(), before, strict=True))


def test_an_evaluation_leaves_layers_without_an_adapter_alone():
    """Gradients pass through them. One of 40 outputs cannot even be repacked."""
    model = nn.Sequential(layer((128, 64)), nn.GELU(), layer((64, 96)), nn.GELU(), layer((96, 40)))
    for linear in (model[0], model[2], model[4]):
        linear.support_avx512bf16_for_cpu = True
    repack(model[2])
    la.attach(model, la.LoRA(rank=4, targets=["0"]))
    move(model)
    x = inputs().requires_grad_()
    (expected,) = torch.autograd.grad(model.train()(x).square().sum(), x)
    assert expected.any()
    with torch.no_grad():
        value = model.eval()(inputs())
    (gradient,) = torch.autograd.grad(model.train()(x).square().sum(), x)
    assert torch.equal(gradient, expected)
    assert torch.equal(model(x), value)
    assert not any(model[i].support_avx512bf16_for_cpu for i in (2, 4))


def test_loran_that_starts_away_from_zero():
    model, x = network(), inputs()
    before = model(x)
    la.attach(model, la.LoRAN(rank=4, function="relu", frequency="calibrate", start_size=0.01))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    move(model)
    y = model(x)
    y.square().sum().backward()
    assert model[0].lora_A.grad.any()
    la.merge(model)
    torch.testing.assert_close(model(x), y.detach(), rtol=1e-4, atol=1e-4)
