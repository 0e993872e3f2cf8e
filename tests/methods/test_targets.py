"""Which modules a method takes, which it leaves, and what is said when there are none."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lit_adapters as la
from lit_adapters.methods.targets import head_modules
from lit_adapters.model.record import attachment
from tests.matrix import MODELS, build


def names(model, method, train=()):
    la.attach(model, method, train=train)
    return [name for name, _ in la.adapters(model)]


def vit():
    return timm.create_model("test_vit", img_size=32, depth=2, num_classes=5)


def test_all_linear_leaves_the_head_alone():
    found = names(vit(), la.LoRA(rank=2))
    assert len(found) == 8
    assert not any(n.startswith("head") for n in found)
    assert "lm_head" not in names(MODELS["llama"].make(), la.LoRA(rank=2))
    # a classifier that no getter tells of is named by `train`
    assert "classifier" not in names(MODELS["bert"].make(), la.LoRA(rank=2), train=["classifier"])


def test_suffixes_expressions_and_exclude():
    assert names(vit(), la.LoRA(rank=2, targets=["qkv", "mlp.fc1"])) == [
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc1",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
    ]
    assert names(vit(), la.LoRA(rank=2, targets=r"blocks\.1\..*fc\d")) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert names(vit(), la.LoRA(rank=2, targets=["qkv"], exclude=["blocks.0.attn.qkv"])) == ["blocks.1.attn.qkv"]
    assert "kv" not in "".join(names(vit(), la.LoRA(rank=2, exclude=["qkv"])))


def test_a_suffix_is_made_of_whole_parts():
    with pytest.raises(la.TargetsNotFound, match=r"Near misses: .*qkv"):
        names(vit(), la.LoRA(rank=2, targets=["kv"]))


def test_activations_are_those_of_the_mlps():
    assert names(vit(), la.NoRA(groups=4)) == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    assert names(MODELS["llama"].make(), la.NoRA(groups=4)) == [
        "model.layers.0.mlp.act_fn",
        "model.layers.1.mlp.act_fn",
    ]
    found = names(MODELS["bert"].make(), la.NoRA(groups=4))
    assert found == [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)]  # no pooler
    assert names(MODELS["bert"].make(), la.NoRA(groups=4, targets=["pooler.activation"])) == ["bert.pooler.activation"]


def test_squeeze_and_excite_gates_are_left_alone():
    with pytest.raises(la.TargetsNotFound, match=r"Modules it could adapt if named: .*bn1[.]act"):
        names(timm.create_model("test_efficientnet"), la.NoRA(groups=4))


def test_near_misses_are_listed():
    with pytest.raises(la.TargetsNotFound, match=r"targets \['qvk'\] match no module of VisionTransformer.*qkv"):
        names(vit(), la.LoRA(targets=["qvk"]))
    with pytest.raises(la.TargetsNotFound, match=r"train='haed' matches no parameter"):
        names(vit(), la.LoRA(rank=2), train="haed")
    with pytest.raises(la.AdapterError, match="not a regular expression"):
        names(vit(), la.LoRA(rank=2, targets="*.qkv"))


class FunctionalMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def test_a_function_in_the_place_of_a_module_is_named():
    model = nn.ModuleDict({"mlp": FunctionalMlp()})
    with pytest.raises(la.TargetsNotFound, match=r"no known activation module of their own .*mlp \(FunctionalMlp\)"):
        names(model, la.NoRA(groups=2))


def test_one_activation_object_in_several_layers_gets_an_adapter_in_each():
    act = nn.GELU()
    model = nn.Sequential(
        *(nn.ModuleDict({"fc": nn.Linear(4, 4), "act": act}) for _ in range(2)),
    )
    la.attach(model, la.NoRA(groups=2))
    adapters = [a for _, a in la.adapters(model)]
    assert len(adapters) == 2
    assert adapters[0].numerator_A is not adapters[1].numerator_A


def test_a_layer_at_two_places_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    la.attach(model, la.LoRA(rank=2))
    assert model["a"][0] is model["b"][0]

    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with pytest.raises(la.AdapterError, match="one and the same layer"):
        la.attach(model, la.LoRA(rank=2, targets=["a.0"]))


def test_a_tied_head_may_not_train():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    with pytest.raises(la.AdapterError, match=r"'lm_head.weight' is tied to 'transformer.wte.weight'"):
        la.attach(GPT2LMHeadModel(config), la.NoRA(groups=4), train=["lm_head"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (la.NoRA(groups=7), r"7 groups do not divide the 192 channels of 'blocks.0.mlp.act'"),
        (la.LoRA(rank=65), r"rank 65 exceeds the size of 'blocks.0.attn.qkv' \(192 x 64\)"),
        ([la.LoRA(rank=2), la.LoRA(rank=2, targets=["qkv"])], "both want 'blocks.0.attn.qkv'"),
        (la.LoRA(rank=2, targets=["mlp.act"]), "'blocks.0.mlp.act' is neither: this is a GELU"),
        (la.NoRA(targets=["qkv"]), "'blocks.0.attn.qkv' is a Linear"),
    ],
)
def test_a_refusal_leaves_the_model_untouched(method, message):
    model = vit().eval()
    types, keys = [type(m) for m in model.modules()], list(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(la.AdapterError, match=message):
        la.attach(model, method)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), expected)
    la.attach(model, la.LoRA(rank=2))  # and can be adapted still


def test_attaching_twice_is_refused():
    model = vit()
    la.attach(model, la.LoRA(rank=2))
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.attach(model, la.NoRA(groups=4))
    la.detach(model)
    la.attach(model, la.NoRA(groups=4))


def test_attention_output_projections_that_never_run_are_not_taken():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(model, la.LoRA(rank=2)) == ["linear1", "linear2"]


def test_the_pooler_of_bert_is_linear_all_the_same():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    assert "bert.pooler.dense" in names(BertForSequenceClassification(config), la.LoRA(rank=2), train=["classifier"])


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_head_is_known_inside_another_module(name):
    """Such as a LightningModule that holds the network."""
    holder, head = nn.ModuleDict({"net": build(name)}), MODELS[name].head
    assert head_modules(holder) == [holder["net"].get_submodule(head)]
    report = la.attach(holder, la.LoRA(rank=2), train=[head])
    assert f"net.{head}" not in dict(la.adapters(holder))
    assert all(n.startswith(f"net.{head}.") for n in report.head)
    assert not report.trained


def test_stems_and_gates_of_a_real_model_are_taken_by_name_only():
    with torch.device("meta"):
        resnet = timm.create_model("seresnext26t_32x4d", num_classes=5)
    assert not [n for n in names(resnet, la.NoRA()) if n.startswith(("conv1", "act1", "bn1")) or ".se." in n]
    la.detach(resnet)
    assert "layer1.0.se.act" in names(resnet, la.NoRA(groups=4, targets=["se.act"], channel_dim=1))


def test_poolers_stems_gates_and_heads_of_any_model():
    parts = ("mlp", "pooler", "stem", "gate", "head", "classifier", "ffn", "se", "router")
    model = nn.ModuleDict({n: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for n in parts})
    assert names(model, la.NoRA()) == ["mlp.1", "ffn.1"]


def test_mlps_of_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8))
    assert names(model, la.NoRA()) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    la.detach(model)
    assert names(model, la.LoRA(rank=2))[:4] == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_a_suffix_written_as_a_string_is_explained():
    with pytest.raises(la.TargetsNotFound, match=r"regular expression for the whole name; write \['qkv'\]"):
        la.attach(vit(), la.LoRA(targets="qkv"))
    with pytest.raises(la.TargetsNotFound, match=r"train='qkv' .* write \['qkv'\]"):
        la.attach(vit(), la.LoRA(rank=2), train="qkv")
    with pytest.raises(la.AdapterError, match=r"exclude 'qkv' must be a list of name suffixes: \['qkv'\]"):
        la.LoRA(exclude="qkv")


def test_an_activation_with_parameters_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 2))
    with pytest.raises(la.AdapterError, match="PReLU has parameters of its own"):
        la.attach(model, la.NoRA(groups=2))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "4.weight", "4.bias"]
    la.attach(model, la.NoRA(groups=2, exclude=["3"]))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.GELU()
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    "method",
    [
        la.LoRA(rank=2, targets=["q_proj", "v_porj"]),
        la.DoRA(rank=2, targets=["v_porj", "q_proj"]),
        la.VeRA(rank=2, targets=["v_proj", "v_porj", "q_proj"]),
        la.BitFit(targets=["q_proj", "v_porj"]),
        la.NoRA(groups=4, channel_dim=-1, targets=["act", "v_porj"]),
        la.NoRAPlusPlus(
            nora=la.NoRA(groups=4, channel_dim=-1, targets=["act"]), lora=la.LoRA(rank=2, targets=["q_proj", "v_porj"])
        ),
        la.Peft({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_porj"]}),
        la.Peft({"peft_type": "IA3", "target_modules": ["q_proj", "v_porj"], "feedforward_modules": []}),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_name_of_a_list_must_match(method):
    model = Pair()
    with pytest.raises(la.TargetsNotFound, match=r"'v_porj'.* matches no .*Near misses: v_proj"):
        la.attach(model, method)
    assert type(model.q_proj) is nn.Linear
    assert not any(True for _ in la.adapters(model))


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj", "down_proj"], "down_proj"])
def test_experts_that_are_a_parameter_are_no_target(targets):
    with pytest.raises(la.TargetsNotFound, match=r"'down_proj' is a parameter \(3 x 8 x 8\) of Pair, and not a module"):
        la.attach(Pair(), la.LoRA(rank=2, targets=targets))


def test_the_report_says_what_all_linear_leaves_alone():
    report = la.attach(Pair(), la.LoRA(rank=2))
    assert report.left == {"down_proj": 192}
    assert (
        "left alone                       192 parameters   down_proj: 48% of the model, as these are not linear"
        in str(report)
    )
    assert la.attach(Pair(), la.LoRA(rank=2), train=["down_proj"]).left == {}
    assert la.attach(Pair(), la.LoRA(rank=2, targets=["q_proj"])).left == {}
    both = nn.ModuleDict({"experts": Pair(), "down_proj": nn.Linear(8, 8)})
    assert list(la.attach(both, la.LoRA(rank=2, targets=["down_proj"])).left) == ["experts.down_proj"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_nothing_is_said_of_ordinary_language_models(name):
    assert "left alone" not in str(la.attach(build(name), la.LoRA(rank=2)))


def test_directories_of_earlier_versions_may_hold_names_without_a_match(tmp_path):
    for method in (la.LoRA(rank=2, targets=["q_proj"]), la.Peft({"peft_type": "LORA", "target_modules": ["q_proj"]})):
        model, again = Pair(), Pair()
        again.load_state_dict(model.state_dict())
        la.attach(model, method)
        arguments = attachment(model).methods[0]["init_args"]
        recorded = arguments.get("targets") or arguments["config"]["target_modules"]
        recorded.append("v_porj")
        la.save_adapters(model, tmp_path)
        assert "v_porj" in (tmp_path / "lit_adapter.json").read_text()
        assert [name for name, *_ in la.load_adapters(again, tmp_path).adapters] == ["q_proj"]
