"""BitFit against plain biases that train, its formula, and merged models that are saved with new biases."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lit_adapters as la
from lit_adapters.methods.bitfit import BitFitAdapter
from tests.matrix import MODELS, build, changed_tensors, move


def names(network: nn.Module) -> list[str]:
    return [name for name, _ in la.adapters(network)]


def norms() -> nn.Module:
    """Convolutions and norms, whose channels are not the last dimension."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2),
        nn.GroupNorm(2, 8),
        timm.layers.LayerNorm2d(8),
        nn.Flatten(),
        nn.LayerNorm(8 * 81),
        nn.Linear(8 * 81, 4),
    )


PLAIN = {name: (lambda name=name: build(name)) for name in ("vit", "swin", "convnext", "gpt2", "bert")}
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run(network: nn.Module, name: str) -> Tensor:
    return network(IMAGES) if name == "norms" else MODELS[name].run(network)


# ---- the biases that are there


@pytest.mark.parametrize("name", [*PLAIN, "norms"])
def test_trains_as_the_biases_of_the_plain_model_would(name):
    make = PLAIN.get(name, norms)
    adapted, plain = make().train(), make().train()
    la.attach(adapted, la.BitFit())
    chosen = [f"{n}.bias" for n in names(adapted)]
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(key in chosen)
    optimizers = []
    for network in (adapted, plain):
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(trained, lr=0.01, momentum=0.9))
    for step in range(4):
        for network, optimizer in zip((adapted, plain), optimizers, strict=True):
            optimizer.zero_grad()
            run(network, name).square().mean().backward()
            if step:
                optimizer.step()
        for key in chosen:
            expected = plain.get_parameter(key).grad
            actual = adapted.get_submodule(key.removesuffix(".bias")).delta_bias.grad
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    la.merge(adapted)
    assert max((adapted.get_parameter(k) - plain.get_parameter(k)).abs().max() for k in chosen) <= 1e-6
    assert max((plain.get_parameter(k) - make().get_parameter(k)).abs().max() for k in chosen) > 1e-4
    assert not changed_tensors(
        {k: v for k, v in make().named_parameters() if k not in chosen},
        {k: v for k, v in adapted.named_parameters() if k not in chosen},
    )
    for (_, actual), (key, expected) in zip(adapted.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=key)  # running statistics


@pytest.mark.parametrize("name", PLAIN)
def test_every_bias_outside_the_head_has_an_adapter(name):
    network = build(name)
    head = MODELS[name].head
    biases = [k for k, _ in network.named_parameters() if k.endswith(".bias") and not k.startswith(f"{head}.")]
    la.attach(network, la.BitFit(), train=[head])
    assert [f"{n}.bias" for n in names(network)] == biases
    assert all(a.delta_bias.shape == a.bias.shape for _, a in la.adapters(network))


def test_modules_of_train_keep_their_biases():
    network = build("bert")
    la.attach(network, la.BitFit(), train=["classifier", "pooler"])
    assert not [n for n in names(network) if "pooler" in n or "classifier" in n]


LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (2, 3, 5), (6,)),
    "conv1d": (lambda: Conv1D(6, 5), (2, 3, 5), (6,)),
    "layer-norm": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6), (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), (6, 1, 1)),
    "batch-norm": (lambda: nn.BatchNorm2d(6), (2, 6, 3, 3), (6, 1, 1)),
    "group-norm": (lambda: nn.GroupNorm(3, 6), (2, 6, 4), (6, 1)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_formula_in_float64(kind):
    make, shape, channels = LAYERS[kind]
    network = nn.Sequential(make()).double()
    nn.init.normal_(network[0].bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = network(x)
    la.attach(network, la.BitFit())
    assert torch.equal(network(x), expected)
    d = network[0].delta_bias
    nn.init.normal_(d)
    y = network(x)
    torch.testing.assert_close(y, expected + d.double().view(channels), rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    axes = [i for i in range(y.dim()) if i != (1 if shape[1] in (4, 6) and channels != (3, 6) else y.dim() - 1)]
    total = grad.sum(0) if kind == "layer-norm" else grad.sum(axes)
    torch.testing.assert_close(torch.autograd.grad(y, d, grad)[0], total.float(), rtol=1e-6, atol=1e-6)


def test_changes_below_the_resolution_of_bfloat16_add_up():
    network = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    nn.init.ones_(network[0].bias)
    la.attach(network, la.BitFit())
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(8):
            network[0].delta_bias += 0.001  # 1 + 0.001 is 1 in bfloat16
    assert (network(x) == 1.0078125).all()
    assert network[0].delta_bias.dtype == torch.float32
    la.merge(network)
    assert (network[0].bias == 1.0078125).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norms", "convnext"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    network = (norms() if name == "norms" else build(name)).eval()
    la.attach(network, la.BitFit(add_missing=True))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    trained = [p for p in network.parameters() if p.requires_grad]
    for seed in range(2):
        move(network, seed)
        expected, actual = run(network, name), run(compiled, name)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), trained) for y in (expected, actual)]
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-4)


# ---- one bias, one adapter


def test_a_layer_at_two_places_has_one_adapter():
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    la.attach(network, la.BitFit())
    assert network[0] is network[2]
    assert names(network) == ["0"]


def test_a_bias_of_two_layers_is_refused():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    network[1].bias = network[0].bias
    for exclude in ((), ["1"]):
        with pytest.raises(la.AdapterError, match=r"'0.bias' and '1.bias' are one parameter"):
            la.attach(network, la.BitFit(exclude=exclude))
    la.attach(network, la.BitFit(exclude=["0", "1"]))
    assert names(network) == ["2"]


def test_a_bias_that_the_head_shares_is_the_heads():
    network = BertForMaskedLM(build("bert").config)
    assert network.cls.predictions.bias is network.cls.predictions.decoder.bias
    la.attach(network, la.BitFit())
    predictions = [n for n in names(network) if "predictions" in n]
    assert predictions == ["cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"]


# ---- layers that no adapter can reach


def test_multihead_attention_is_refused_with_a_fix_that_works():
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    for targets in ("all-biases", ["self_attn"]):
        with pytest.raises(la.AdapterError, match=r"MultiheadAttention.*exclude=\['self_attn'\]"):
            la.attach(network, la.BitFit(targets=targets))
    with pytest.raises(la.AdapterError, match=r"reads 'layers.0.self_attn.out_proj' without calling it"):
        la.attach(network, la.BitFit(targets=["out_proj"]))
    la.attach(network, la.BitFit(exclude=["self_attn"]))
    assert names(network) == [f"layers.0.{n}" for n in ("linear1", "linear2", "norm1", "norm2")]
    move(network)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = network(x)
        la.merge(network)
        torch.testing.assert_close(network(x), before)


def test_a_weight_that_the_parent_reads_gets_no_bias():
    network = timm.create_model("test_vit", img_size=32, depth=1, num_classes=5)
    swin = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4, num_classes=5
    )
    for model in (network, swin):
        la.attach(model, la.BitFit(add_missing=True))
        move(model)
        la.verify(model, torch.randn(1, 3, 32, 32))
    assert not [n for n in names(swin) if n.endswith("qkv")]  # its biases are q_bias and v_bias
    with pytest.raises(la.AdapterError, match=r"WindowAttention reads 'layers.0.blocks.0.attn.qkv' without calling it"):
        la.detach(swin) or la.attach(swin, la.BitFit(targets=["qkv"], add_missing=True))


def test_a_bias_beside_other_layers_is_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.inner = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    with pytest.raises(la.AdapterError, match="'0' holds a bias beside layers"):
        la.attach(nn.Sequential(Block()), la.BitFit())


def test_a_computed_bias_is_refused():
    network = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(network[0], "bias", nn.Tanh())
    with pytest.raises(la.AdapterError, match="the bias of '0' is not a parameter of its own"):
        la.attach(network, la.BitFit(targets=["0"]))


# ---- biases that are added


def test_a_final_merge_of_llama_is_saved_and_loaded(tmp_path):
    network = build("llama")
    la.attach(network, la.BitFit(add_missing=True))
    assert len(names(network)) == 14
    move(network)
    before = MODELS["llama"].run(network)
    la.merge(network)
    after = MODELS["llama"].run(network)
    torch.testing.assert_close(after, before)
    assert (network.config.attention_bias, network.config.mlp_bias) == (True, True)
    assert all(p.requires_grad for p in network.parameters())
    network.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not changed_tensors(network.state_dict(), loaded.state_dict())
    assert torch.equal(MODELS["llama"].run(loaded), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_a_switch_covers_too_get_zeros(dtype, tmp_path):
    network = build("llama", dtype)
    la.attach(network, [la.BitFit(targets=["q_proj", "v_proj"], add_missing=True), la.LoRA(rank=2, targets=["o_proj"])])
    move(network)
    la.merge(network)
    assert (network.config.attention_bias, network.config.mlp_bias) == (True, False)
    for attention in (layer.self_attn for layer in network.model.layers):
        assert attention.q_proj.bias.any()
        for untouched in (attention.k_proj, attention.o_proj):
            assert untouched.bias.dtype == dtype
            assert not untouched.bias.any()
            assert untouched.bias.requires_grad
    network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not changed_tensors(network.state_dict(), loaded.state_dict())
    if dtype == torch.float32:  # a cast network has rotary frequencies in bfloat16, a loaded one has not
        assert torch.equal(MODELS["llama"].run(loaded), MODELS["llama"].run(network))


def test_a_model_inside_another_and_a_configuration_inside_another(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "intermediate_size": 24}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    heads = {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, **heads),
        text_config=LlamaConfig(**text, **heads),
        image_token_index=39,
    )
    outer = nn.ModuleDict({"net": LlavaForConditionalGeneration(config)})
    la.attach(outer, la.BitFit(add_missing=True, exclude=["vision_tower"]))
    move(outer)
    la.merge(outer)
    network = outer["net"]
    assert network.config.text_config.attention_bias
    assert network.config.text_config.mlp_bias
    network.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert not changed_tensors(network.state_dict(), loaded.state_dict())


def mistral() -> nn.Module:
    """An architecture without switches for biases."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "intermediate_size": 48}
    return MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def test_a_bias_without_a_switch_is_refused_before_anything_changes():
    network = mistral()
    method = la.BitFit(targets=["q_proj", "o_proj"], add_missing=True)
    message = r"MistralForCausalLM has no switch .*'model.layers.0.self_attn.q_proj', 2 layers .*\['o_proj', 'q_proj'\]"
    with pytest.warns(UserWarning, match=message):
        la.attach(network, method)
    move(network)
    state, tokens = copy.deepcopy(network.state_dict()), MODELS["llama"].inputs()
    before = network(tokens).logits
    with pytest.raises(la.AdapterError, match=message):
        la.merge(network)
    assert not changed_tensors(state, network.state_dict())
    assert torch.equal(network(tokens).logits, before)
    la.merge(network, unload=False)
    torch.testing.assert_close(network(tokens).logits, before)
    la.unmerge(network)
    assert torch.equal(network(tokens).logits, before)


def test_biases_that_are_there_need_no_switch():
    network = build("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.attach(network, la.BitFit(add_missing=True))
    move(network)
    config = network.config.to_dict()
    la.merge(network)
    assert network.config.to_dict() == config


def test_a_layer_without_a_bias_in_a_plain_model_gets_one():
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    keys = list(network.state_dict())
    la.attach(network, la.BitFit(add_missing=True))
    move(network)
    x = torch.randn(5, 3)
    before = network(x)
    la.merge(network, unload=False)
    torch.testing.assert_close(network(x), before)
    la.unmerge(network)
    assert torch.equal(network(x), before)
    la.detach(network)
    assert list(network.state_dict()) == keys
    la.attach(network, la.BitFit(add_missing=True, exclude=["1"]))
    move(network)
    before = network(x)
    la.merge(network)
    assert network[0].bias is not None
    assert network[1].bias is None
    torch.testing.assert_close(network(x), before)


# ---- 4 bit


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_4_bit_layer_stays_quantised(bias, compute):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    network = nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=bias, compute_dtype=compute, quant_type="nf4")).to("cpu")
    x = torch.randn(3, 64)
    expected = network(x)
    la.attach(network, la.BitFit(add_missing=True))
    assert torch.equal(network(x), expected)
    move(network)
    y = network(x)
    d = network[0].delta_bias
    torch.testing.assert_close(y, expected + d, rtol=0, atol=1e-6 if compute == torch.float32 else 0.05)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), d)[0], torch.full((32,), 3.0))
    la.merge(network, unload=False)
    torch.testing.assert_close(network(x), y, rtol=0, atol=1e-5 if compute == torch.float32 else 0.05)
    la.unmerge(network)
    report = la.merge(network)
    assert report.dequantised == []
    assert type(network[0]) is bnb.nn.Linear4bit
    assert network[0].bias.is_floating_point()
    torch.testing.assert_close(network(x), y, rtol=0, atol=1e-5 if compute == torch.float32 else 0.05)


# ---- what is shown, and wrong inputs


def test_the_summary_tells_the_norm_without_the_base():
    d = torch.tensor([3.0, 4.0])
    adapter = la.BitFit().placeholder("layer", {"delta_bias": d}, {})
    assert isinstance(adapter, BitFitAdapter)
    adapter.load_state_dict({"delta_bias": d}, strict=False, assign=True)
    assert adapter.statistics() == {"bias_change": 5.0}
    assert (adapter.summary().size, adapter.summary().change) == ("delta_bias 2", 5.0)
    with pytest.raises(la.AdapterError, match="no delta_bias"):
        la.BitFit().placeholder("layer", {}, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "all-linear"}, "'all-linear' selects weights; BitFit takes 'all-biases'"),
        ({"targets": 3}, "targets 3 must be"),
        ({"exclude": "norm"}, r"\['norm'\]"),
        ({"add_missing": 1}, "add_missing 1 must be True or False"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(la.AdapterError, match=message):
        la.BitFit(**settings)


def test_no_bias_is_said_with_the_fix():
    with pytest.raises(la.TargetsNotFound, match="LlamaForCausalLM outside its head has a bias; add_missing=True"):
        la.attach(build("llama"), la.BitFit())
    with pytest.raises(la.AdapterError, match=r"q_proj' has no bias; add_missing=True"):
        la.attach(build("llama"), la.BitFit(targets=["q_proj"]))
    with pytest.raises(la.TargetsNotFound, match="no linear layer either"):
        la.attach(nn.Sequential(nn.ReLU()), la.BitFit(add_missing=True))
    with pytest.raises(la.AdapterError, match="BitFit adapts linear layers and convolutions"):
        la.attach(build("llama"), la.BitFit(targets=["input_layernorm"], add_missing=True))
