"""What is done with an adapted base of 4 bit: merging, files, copies, casts; what trains, and what is refused."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from lit_adapters.files.adapters import HEADER
from lit_adapters.model.record import frozen_keys
from tests.matrix import changed_tensors
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
    move,
    nesting,
    network,
)

# Merging


@every_method
@pytest.mark.parametrize(("stored", "compute"), [(WIDE, WIDE), (WIDE, HALF), (HALF, WIDE), (HALF, HALF)], ids=str)
def test_merging_dequantises(method, stored, compute):
    model, x = adapted(method, stored=stored, compute=compute).eval(), inputs(stored)
    la.set_progress(model, 1.0)
    with torch.no_grad():
        with la.disabled(model):
            model(x)  # in which bitsandbytes casts the bias to what it computes in
        expected = model(x)
        exact = {n: a.adapted_weight(torch.float64) for n, a in la.adapters(model)}
        by_hand = {n: dequantised(a.weight) + a.delta_weight(torch.float64) for n, a in la.adapters(model)}
    report = la.merge(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert {p.dtype for p in model.parameters()} == {stored}
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert report.merged == report.dequantised == ["0", "2"]
    assert str(report).endswith("; 2 of them were quantised and take the memory of plain weights now")
    stores = {n: model.get_submodule(n).weight for n in exact}
    assert report.max_abs_error == pytest.approx(max((stores[n].double() - exact[n]).abs().max().item() for n in exact))
    assert 0 < report.max_rel_error <= 2 * torch.finfo(stored).eps
    plain = stored == compute == WIDE
    assert all(error(stores[n], by_hand[n]) <= (1e-6 if plain else 1e-2) for n in exact)
    with torch.no_grad():
        assert error(model(x), expected.double()) <= (2e-6 if plain else 2e-2)


@nesting
@every_method
def test_a_reversible_merge_leaves_no_trace(method, nested):
    model, x = adapted(method, nested=nested), inputs()
    la.set_progress(model, 1.0)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    report = la.merge(model, unload=False)
    assert report.dequantised == ["0", "2"]
    assert error(model(x), expected.double()) <= 2e-6
    assert not changed_tensors(before, model.state_dict())
    la.unmerge(model)
    assert not changed_tensors(before, model.state_dict())
    assert torch.equal(model(x), expected)


# Files, copies and moves


@every_method
def test_adapters_are_saved_and_loaded(method, tmp_path):
    base = network()
    model = copy.deepcopy(base)
    la.attach(model, METHODS[method])
    la.save_adapters(move(model), tmp_path)
    shapes = json.loads((tmp_path / HEADER).read_text())["base"]["shapes"]
    assert shapes == {"0.weight": "64x128", "0.bias": "64", "2.weight": "96x64", "2.bias": "96"}
    loaded = copy.deepcopy(base)
    la.load_adapters(loaded, tmp_path)
    assert torch.equal(loaded(inputs()), model(inputs()))


@every_method
def test_adapters_trained_on_a_quantised_model_go_onto_the_plain_one(method, tmp_path):
    model = adapted(method)
    la.save_adapters(model, tmp_path)
    plain = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 96))
    with torch.no_grad():
        for name, adapter in la.adapters(model):
            plain.get_submodule(name).weight.copy_(dequantised(adapter.weight))
            plain.get_submodule(name).bias.copy_(adapter.bias)
    with pytest.warns(UserWarning, match="was trained on other weights of this architecture"):
        la.load_adapters(plain, tmp_path)
    assert error(plain(inputs()), model(inputs()).double()) <= 2e-6


@nesting
@every_method
def test_a_state_dict_holds_what_the_quantised_model_puts_there(method, nested):
    model = network(nested=nested)
    before = copy.deepcopy(model.state_dict())
    assert "0.weight.quant_state.bitsandbytes__nf4" in before
    la.attach(model, METHODS[method])
    after = model.state_dict()
    own = {f"{name}.{key}" for name, a in la.adapters(model) for key in a.adapter_tensors()}
    assert after.keys() == before.keys() | own
    assert not changed_tensors(before, {k: v for k, v in after.items() if k not in own})


@nesting
def test_a_checkpoint_of_what_changed_is_small_and_loads_strictly(nested):
    model, other = adapted("lora", nested=nested), adapted("lora", nested=nested)
    changed = {k: v for k, v in model.state_dict().items() if k not in frozen_keys(model)}
    assert changed.keys() == {f"{n}.lora_{pair}" for n in ("0", "2") for pair in "AB"}
    other.load_state_dict(changed)
    assert torch.equal(other[2].lora_B, model[2].lora_B)


@every_method
def test_copies_are_whole_and_apart(method):
    model, x = adapted(method), inputs()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        move(twin)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)


@nesting
@every_method
def test_a_cast_moves_the_rest_and_leaves_weight_and_adapter(method, nested):
    model = adapted(method, nested=nested)
    packed, before = content(model[0].weight), dequantised(model[0].weight)
    model.to(HALF)
    assert {p.dtype for _, a in la.adapters(model) for p in a.adapter_parameters().values()} == {WIDE}
    assert torch.equal(content(model[0].weight), packed)
    assert torch.equal(dequantised(model[0].weight), before)
    assert model[0].bias.dtype == HALF
    assert model(inputs(HALF)).dtype == HALF
    model.to("cpu").float()
    assert torch.equal(content(model[0].weight), packed)


@every_method
def test_a_layer_may_be_quantised_after_attaching_unless_it_was_measured(method):
    model = nn.Sequential(bnb.nn.Linear4bit(128, 64, compute_dtype=WIDE, quant_type="nf4"))
    la.attach(model, METHODS[method])
    model.to("cpu")
    assert model[0].weight.dtype == torch.uint8
    if method == "dora":
        with pytest.raises(
            la.AdapterError, match="'0' was quantised after DoRA had measured its weight; quantise first"
        ):
            model(inputs())
        return
    y = model(inputs())
    with la.disabled(model):
        assert torch.equal(model(inputs()), y)


@every_method
def test_detach_returns_the_very_layers(method):
    model = network()
    layers, weights, x = list(model), [model[0].weight, model[2].weight], inputs()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    la.attach(model, METHODS[method])
    la.detach(move(model))
    assert [a is b for a, b in zip(model, layers, strict=True)] == [True, True, True]
    assert [model[0].weight is weights[0], model[2].weight is weights[1]] == [True, True]
    assert not changed_tensors(before, model.state_dict())
    assert torch.equal(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]


# What trains, and what is refused


@every_method
def test_packed_weights_stay_frozen(method):
    model = network()
    report = la.attach(model, METHODS[method], train=["2.bias"])
    trained = {"dora": 4 * (128 + 64) + 64, "vera": 4 + 64, "lora2": 4 * (128 + 64) + 2 * 4 * 4 + 4}
    assert report.adapters[0][2] == trained.get(method, 4 * (128 + 64))
    assert report.trainable == report.adapter_parameters + 96
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {f"{name}.{key}" for name, a in la.adapters(model) for key in a.adapter_parameters()}
    assert trained == own | {"2.bias"}
    model(inputs()).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_the_report_counts_what_packed_weights_stand_for():
    report = la.attach(network(), METHODS["lora"])
    assert report.total == (128 + 1) * 64 + (64 + 1) * 96 + report.adapter_parameters


@every_method
def test_other_kinds_of_4_bit_layers(method):
    for kind in (bnb.nn.LinearNF4, bnb.nn.LinearFP4):  # subclasses of Linear4bit
        model = nn.Sequential(kind(128, 64, compute_dtype=WIDE).to("cpu"))
        expected = model(inputs())
        la.attach(model, METHODS[method])
        assert torch.equal(model(inputs()), expected)
        la.set_progress(model, 1.0)
        la.merge(model)
        assert error(model(inputs()), expected.double()) <= 2e-6


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lora", "afa", "vera", "dense_lora")])
def test_8_bit_layers_are_refused_where_the_weight_is_needed(method):
    model = nn.Sequential(bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False))
    modules, before = list(model), [(p, p.requires_grad) for p in model.parameters()]
    with pytest.raises(la.AdapterError, match=r"'0', a Linear8bitLt .*quantise to NF4 .* exclude=\['0'\]"):
        la.attach(model, METHODS[method])
    assert list(model) == modules
    assert [(p, p.requires_grad) for p in model.parameters()] == before


# A language model, quantised by transformers


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=40, max_position_embeddings=32, pad_token_id=0)
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@every_method
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=["float32", "bfloat16"])
def test_a_language_model(method, dtype, pretrained):
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = LlamaForCausalLM.from_pretrained(
        pretrained, dtype=dtype, quantization_config=quantisation, device_map="cpu"
    )
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():  # in training mode, in which bitsandbytes repacks nothing: it cannot at these sizes
        expected = model.train()(tokens).logits
    report = la.attach(model.eval(), METHODS[method])
    assert len(report.adapters) == 14  # all but the head
    assert torch.equal(model(tokens).logits, expected)
    la.verify(model, tokens)
    move(model).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    la.set_progress(model.eval(), 1.0)
    with torch.no_grad():
        expected = model(tokens).logits
        assert len(la.merge(model).dequantised) == 14
        assert error(model(tokens).logits, expected.double()) <= (1e-5 if dtype == WIDE else 5e-2)


def test_a_merged_language_model_is_saved_as_a_plain_one(pretrained, tmp_path):
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=WIDE)
    model = LlamaForCausalLM.from_pretrained(pretrained, quantization_config=quantisation, device_map="cpu")
    la.attach(model, la.LoRA(rank=2))
    la.merge(move(model).eval())
    model.save_pretrained(tmp_path)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)
