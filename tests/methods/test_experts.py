"""Adapters of experts that are stored in one parameter."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.optimizers import LoRAPlus, LoRARITE, parameter_groups

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
KINDS = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "phimoe": {},
    "llama4_text": {"intermediate_size_mlp": 64},
    "deepseek_v3": LATENT,
}
METHODS = {
    "lora": la.LoRA(rank=2),
    "dora": la.DoRA(rank=2),
    "loran": la.LoRAN(rank=2, amplitude=1.0, frequency="calibrate"),
    "loran-sine": la.LoRAN(rank=2, function="sine", frequency=20.0),
    "loran-relu": la.LoRAN(rank=2, function="relu", start_size=0.01),
    "loran-divided": la.LoRAN(rank=2, divide_by_root=True, frequency=100.0),
}
IDS = torch.arange(24).view(2, 12) * 5 % 64


class ThreeExperts(nn.Module):
    """Three layers, all with the same input."""

    def __init__(self, transposed=False):
        super().__init__()
        self.num_experts, self.is_transposed = 3, transposed
        weight = torch.randn(3, 6, 8)
        self.weight = nn.Parameter(weight.mT.contiguous() if transposed else weight)

    def forward(self, x):
        return torch.stack([x @ (w if self.is_transposed else w.mT) for w in self.weight])


def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | KINDS[kind])).eval()


def run(model):
    return model(IDS, use_cache=False).logits


def move(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_each_expert_has_the_adapter_of_a_linear_layer(method, transposed):
    """Value and gradients against the method's own adapter, in float64."""
    experts = nn.ModuleDict({"experts": ThreeExperts(transposed)})
    weight = experts["experts"].weight.detach().clone()
    x = torch.randn(5, 8)
    before = experts["experts"](x)
    la.attach(experts, METHODS[method])
    torch.testing.assert_close(experts["experts"](x), before, rtol=0, atol=0 if "relu" not in method else 1e-7)
    move(experts)
    (_, adapter) = next(la.adapters(experts))
    layers = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(3))
    for i, layer in enumerate(layers):
        layer.weight.data.copy_(weight[i].mT if transposed else weight[i])
    la.attach(layers, METHODS[method])
    for i, layer in enumerate(layers):
        for name, tensor in layer.adapter_tensors().items():
            tensor.data.copy_(adapter.adapter_tensors()[f"weight_{name}"][i])
        layer.clear_caches()
    y, expected = experts["experts"](x), torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    for i, layer in enumerate(layers):
        for name, parameter in layer.adapter_parameters().items():
            found = adapter.adapter_parameters()[f"weight_{name}"].grad[i]
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)
    merged = {}
    for one in (experts, layers):
        for _, a in la.adapters(one):
            merged.setdefault(one, []).append(a.merged_parameters(torch.float64)["weight"])
    stacked = torch.stack(merged[layers])
    torch.testing.assert_close(merged[experts][0], stacked.mT if transposed else stacked, rtol=1e-6, atol=1e-6)


def test_lora_is_that_of_peft():
    model, other = build("mixtral"), build("mixtral")
    la.attach(model, la.LoRA(rank=2, alpha=4.0, targets=["gate_up_proj", "down_proj"]))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = peft.get_peft_model(other, config)
    move(model)
    wrapped = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "ParamWrapper"}
    assert len(wrapped) == 4
    for name, layer in wrapped.items():
        block = next(a for n, a in la.adapters(model) if n.split(".")[2] == name.split(".")[4])
        a, b = block.pair(layer.parameter_name)
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        lora_a.data.copy_(a.detach().reshape(lora_a.shape))  # (E r, in)
        lora_b.data.copy_(b.detach().permute(1, 2, 0).reshape(lora_b.shape))  # (out, r E)
    with torch.no_grad():
        assert not torch.allclose(run(build("mixtral")), run(model), atol=1e-4)
        torch.testing.assert_close(run(model), run(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "loran"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers(kind, method, tmp_path):
    model = build(kind)
    with torch.no_grad():
        before = run(model)
    if method == "dora" and kind == "llama4_text":
        with pytest.raises(la.AdapterError, match=r"Llama4TextExperts \('.*experts'\) does not say which dimension"):
            la.attach(model, METHODS[method])
        return
    report = la.attach(model, METHODS[method])
    assert not [n for n in report.left if "experts" in n]
    experts = [n for n, _, _ in report.adapters if n.endswith("experts")]
    assert len(experts) == (1 if kind == "deepseek_v3" else 2)
    with torch.no_grad():
        assert torch.equal(run(model), before)
    model.train()
    run(model).float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    move(model)
    la.verify(model, IDS)
    with torch.no_grad():
        adapted = run(model)
        assert not torch.allclose(adapted, before, atol=1e-3)
        la.save_adapters(model, tmp_path)
        loaded = build(kind)
        la.load_adapters(loaded, tmp_path)
        assert torch.equal(run(loaded), adapted)
        with la.disabled(model):
            assert torch.equal(run(model), before)
        la.merge(model)
        torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-4)
    saved = read_saved(tmp_path)
    assert saved.layers[experts[0]].adapter is not None
    assert "r = 2" in saved.layers[experts[0]].adapter.summary().size


OLD = pytest.mark.skipif(torch.__version__ < TorchVersion("2.9"), reason="transformers' grouped_mm needs torch 2.9")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", pytest.param("grouped_mm", marks=OLD)])
def test_every_implementation_of_experts_sees_the_adapter(implementation):
    model = build("mixtral")
    la.attach(model, la.LoRA(rank=2))
    move(model)
    with torch.no_grad():
        expected = run(model)
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generation_keeps_the_formed_weights(dtype):
    model = build("qwen3_moe").to(dtype)
    la.attach(model, la.LoRA(rank=2))
    move(model)
    with torch.no_grad():
        first = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
        adapter = next(a for n, a in la.adapters(model) if n.endswith("experts"))
        weight = adapter._weight("down_proj")
        assert weight.dtype == dtype
        assert adapter._weight("down_proj") is weight
        move(model)
        assert adapter._weight("down_proj") is not weight
    assert first.shape == (1, 16)


def test_one_parameter_of_the_experts_and_ranks_of_their_own():
    model = build("mixtral")
    report = la.attach(model, la.LoRA(rank=2, targets=["down_proj"], rank_pattern={r".*layers\.1.*down_proj": 3}))
    adapters = dict(la.adapters(model))
    assert list(adapters) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert [a.pair("down_proj")[0].shape[1] for a in adapters.values()] == [2, 3]
    assert [a.merges_into for a in adapters.values()] == [["down_proj"], ["down_proj"]]
    assert report.left == {}
    model = build("mixtral")
    assert "experts" not in str(la.attach(model, la.LoRA(rank=2, exclude=["experts"])).adapters)
    model = build("mixtral")
    la.attach(model, la.LoRA(rank=2, exclude=["gate_up_proj"]))
    assert next(a for n, a in la.adapters(model) if n.endswith("experts")).merges_into == ["down_proj"]


def test_functions_and_weights_of_experts_together():
    model = build("mixtral")
    nora = la.NoRA(groups=4, targets=["experts.act_fn"], channel_dim=-1, base="anchored")
    la.attach(model, la.NoRAPlusPlus(nora=nora, lora=la.LoRA(rank=2)))
    move(model)
    run(model).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_several_adapters_of_experts():
    model = build("mixtral")
    outputs = {}
    for key, method in (("a", METHODS["lora"]), ("b", METHODS["dora"])):
        la.attach(model, method, name=key)
        move(model)
        with torch.no_grad():
            outputs[key] = run(model)
    with torch.no_grad():
        for key, output in outputs.items():
            la.use(model, key)
            assert torch.equal(run(model), output)
    with pytest.raises(la.AdapterError, match="exclude experts"), la.rows(model, ["a", "b"]):
        pass


def test_a_directory_of_an_earlier_version_has_no_experts(tmp_path):
    model = build("mixtral")
    la.attach(model, la.LoRA(rank=2, exclude=["experts"]))
    move(model)
    model._lit_adapters.methods[0]["init_args"]["exclude"] = []  # as it was recorded
    la.save_adapters(model, tmp_path)
    loaded = build("mixtral")
    la.load_adapters(loaded, tmp_path)
    with torch.no_grad():
        assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (la.LoRA(rank=2, dropout=0.1), "dropout 0.1 acts on the inputs of single layers"),
        (la.LoRA(rank=33), "rank 33 exceeds the size"),
        (
            la.LoRA(rank=20, exclude=["self_attn", "gate"]),
            r"rank 20 exceeds the size of '.*experts\.down_proj' \(32 x 16\)",
        ),
        (la.LoRA(rank=2, start="pissa"), "experts of '.*' cannot have start='pissa'"),
        (la.AFALoRA(rank=2, targets=["down_proj"]), r"is a parameter \(4 x 32 x 16\) of Qwen3MoeExperts"),
        (la.VeRA(rank=2, targets=["down_proj"]), r"is a parameter \(4 x 32 x 16\)"),
    ],
)
def test_what_is_refused(method, message):
    model = build("qwen3_moe")
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, method)
    assert not list(la.adapters(model))


def test_peft_directories_and_low_rank_forms_refuse_experts(tmp_path):
    model = build("mixtral")
    la.attach(model, la.LoRA(rank=2))
    for call in (lambda: la.export_peft(model, tmp_path / "out"), lambda: la.to_lora(model, 2)):
        with pytest.raises(la.AdapterError, match="experts"):
            call()
    assert not (tmp_path / "out").exists()
    copied = copy.deepcopy(model)
    assert len(list(la.adapters(copied))) == len(list(la.adapters(model)))


@pytest.mark.parametrize("method", [la.AFALoRA(rank=2), la.VeRA(rank=2)])
def test_methods_that_leave_experts_alone_say_so(method):
    model = build("mixtral")
    with pytest.warns(UserWarning, match=r"does not adapt weights .*: 4 of them stay as they are, 'model\.layers\.0"):
        report = la.attach(model, method)
    assert "experts" in str(report)
    la.detach(model)
    method.exclude = ["experts"]
    la.attach(model, method)


def test_optimisers_of_pairs():
    model = build("mixtral")
    la.attach(model, la.LoRA(rank=2))
    optimizer = LoRAPlus(parameter_groups(model, 1e-3, pairs=True), ratio=16.0)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # A has no gradient while B is 0
        run(model).square().sum().backward()
        optimizer.step()
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters() if n in before}
    assert (
        moved["model.layers.0.mlp.experts.down_proj_lora_B"] > 8 * moved["model.layers.0.mlp.experts.down_proj_lora_A"]
    )
    with pytest.raises(la.AdapterError, match="holds the pairs of several experts in one parameter"):
        LoRARITE(parameter_groups(model, 1e-3, pairs=True))


def test_weights_of_experts_add_up_and_merge():
    model = build("mixtral")
    for key, method in (("a", METHODS["lora"]), ("b", METHODS["dora"])):
        la.attach(model, method, name=key)
        move(model)
    la.use(model, ["a", "b"])
    with torch.no_grad():
        together = run(model)
        la.merge(model, unload=False)
        torch.testing.assert_close(run(model), together, rtol=1e-4, atol=1e-4)
    la.unmerge(model)
    with pytest.raises(la.AdapterError, match="holds weights of experts, which are not combined"):
        la.combine(model, ["a", "b"], name="c", rank=4)
    assert la.in_use(model) == ["a", "b"]


def test_dora_measures_another_base_that_is_loaded():
    model = build("mixtral")
    la.attach(model, METHODS["dora"])
    torch.manual_seed(9)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    model.load_state_dict(other.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(other), rtol=1e-5, atol=1e-6)
