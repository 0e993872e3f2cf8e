"""Parameter groups: what trains, at which rate, and what decays."""

import pytest
import torch
from timm import create_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from lit_adapters.optimizers.groups import parameter_groups


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3))


def attached():
    model = mlp()
    la.attach(model, la.NoRAPlusPlus(nora=la.NoRA(groups=2), lora=la.LoRA(rank=2, targets=["0", "2"])), train=["3"])
    return model


def test_groups_hold_every_trainable_parameter_once():
    model = attached()
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, lr_scale={"nora": 2.0, "head": 0.5})
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates == pytest.approx({"nora": 2e-2, "lora": 1e-2, "head": 5e-3})
    decay = {g["name"]: g["weight_decay"] for g in groups}
    assert decay == {"nora": 0.0, "lora": 0.1, "head": 0.1}
    torch.optim.AdamW(groups)


def test_names_differ_where_a_method_has_parameters_of_both_kinds():
    model = mlp()
    la.attach(model, [la.DoRA(rank=2, targets=["0"]), la.LoRAN(rank=2, function="sine", targets=["2"])], train=["3"])
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1, lr_scale={"dora": 2.0})
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        "dora": (2e-2, 0.1, 2),
        "dora/no_decay": (2e-2, 0.0, 1),
        "loran": (1e-2, 0.1, 2),
        "loran/no_decay": (1e-2, 0.0, 1),
        "head": (1e-2, 0.1, 2),
    }


def test_a_rational_activation_that_trains_does_not_decay():
    model = attached()
    la.merge(model)
    model.requires_grad_(True)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    rational = {id(p) for m in model.modules() if isinstance(m, la.RationalActivation) for p in m.parameters()}
    assert undecayed == rational


def test_bad_requests_are_named():
    with pytest.raises(la.AdapterError, match=r"lr_scale names 'lroa'; the trainable groups are head, lora, nora"):
        parameter_groups(attached(), lr=1.0, lr_scale={"lroa": 1.0})
    with pytest.raises(la.AdapterError, match="nothing trains"):
        parameter_groups(mlp().requires_grad_(False), lr=1.0)


# Head, base and regular expressions


def vit(train=".*", methods=()):
    model = create_model("test_vit", pretrained=False, num_classes=10)
    la.attach(model, list(methods), train=train)
    return model


def llama(train, methods=(), **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **changes))
    la.attach(model, list(methods), train=train)
    return model


def named_rates(model, lr_scale, lr=1e-4):
    """The rate of each parameter that trains, by name, and that of each group."""
    groups = parameter_groups(model, lr=lr, lr_scale=lr_scale)
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] for g in groups for p in g["params"]}, {g["name"]: g["lr"] for g in groups}


def layout(model, lr_scale=None):
    """What the state of an optimiser holds of groups: names and the parameters of each, in order."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [(g["name"], [names[id(p)] for p in g["params"]]) for g in parameter_groups(model, 1e-4, 0.1, lr_scale)]


def test_full_fine_tuning_with_a_rate_for_the_head():
    rates, groups = named_rates(vit(), {"head": 300.0})
    assert groups == pytest.approx({"base": 1e-4, "head": 3e-2})
    assert {n for n, rate in rates.items() if rate > 1e-3} == {"head.weight", "head.bias"}
    assert len(rates) == len(list(vit().parameters()))


def test_groups_are_as_without_scales_where_rates_are_equal():
    model = vit(methods=[la.DoRA(rank=2)])
    plain = layout(model)
    assert [name for name, _ in plain] == ["head", "dora", "dora/no_decay"]
    for scale in ({"head": 3.0, "base": 3.0}, {"dora": 2.0}, {"head": 1.0}, {r"blocks\.0\..*": 1.0}):
        assert layout(model, scale) == plain
    assert [name for name, _ in layout(vit(".*norm.*"))] == ["head"]
    assert [name for name, _ in layout(vit(".*norm.*"), {"base": 2.0})] == ["base"]


def test_an_earlier_state_of_an_optimiser_is_resumed():
    """A run that was saved when head and base were one group goes on, with scales that are equal."""
    model = vit()
    parameters = [p for p in model.parameters() if p.requires_grad]
    earlier = torch.optim.AdamW([{"params": parameters, "name": "head", "lr": 3e-4, "weight_decay": 0.1}])
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    earlier.step()
    fresh = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.1, {"head": 3.0, "base": 3.0}))
    fresh.load_state_dict(earlier.state_dict())
    assert all(torch.equal(fresh.state[p]["exp_avg"], earlier.state[p]["exp_avg"]) for p in parameters)


def test_a_regular_expression_wins_over_groups_and_the_last_one_over_others():
    model = vit(".*(norm|head).*", [la.LoRA(rank=2)])
    scale = {r"blocks\.0\..*": 5.0, "head": 100.0, "lora": 2.0, r".*\.norm1\..*": 7.0, r"head\.bias": 3.0}
    rates, groups = named_rates(model, scale, lr=1.0)
    for name, rate in rates.items():
        if ".norm1." in name:
            assert rate == 7.0
        elif name.startswith("blocks.0."):
            assert rate == 5.0  # the adapters of the block, too
        else:
            expected = {"head.weight": 100.0, "head.bias": 3.0}
            assert rate == expected.get(name, 2.0 if "lora" in name else 1.0)
    assert groups.keys() == {*scale, "base"}
    assert named_rates(model, {r"head\.bias": 3.0, ".*": 2.0})[1].keys() == {".*"}


def test_expressions_match_the_names_that_train_uses():
    """Those in the module that was given to `attach`, wherever it is; a tied parameter has several."""
    holder = nn.ModuleDict({"net": vit(["head"]), "loss": nn.Linear(2, 2)})
    rates, _ = named_rates(holder, {r"head\.bias": 5.0, r"loss\..*": 3.0}, lr=1.0)
    assert rates == {"net.head.weight": 1.0, "net.head.bias": 5.0, "loss.weight": 3.0, "loss.bias": 3.0}
    tied = llama(".*", tie_word_embeddings=True)
    assert named_rates(tied, {r"lm_head\.weight": 5.0}, lr=1.0)[0]["model.embed_tokens.weight"] == 5.0


def test_the_head_of_a_language_model():
    rates, _ = named_rates(llama(".*"), {"head": 10.0}, lr=1.0)
    assert [n for n, rate in rates.items() if rate == 10.0] == ["lm_head.weight"]
    frozen = llama(["norm"], [la.LoRA(rank=2)])
    assert named_rates(frozen, {"base": 10.0}, lr=1.0)[0]["model.norm.weight"] == 10.0
    with pytest.raises(
        la.AdapterError, match="lr_scale names 'head'; the trainable groups are base, lora: the head is"
    ):
        parameter_groups(frozen, lr=1.0, lr_scale={"head": 1.0})


def test_a_model_that_names_no_head():
    """`train` is the head then, as in the report of `attach`; but not if it is the whole model."""
    assert named_rates(attached(), {"head": 2.0}, lr=1.0)[1] == {"lora": 1.0, "nora": 1.0, "head": 2.0}
    whole = mlp()
    assert named_rates(whole, {"base": 2.0, r"3\..*": 5.0}, lr=1.0)[1] == {"base": 2.0, r"3\..*": 5.0}
    with pytest.raises(la.AdapterError, match=r"trainable groups are base: .* does not name it by get_classifier"):
        parameter_groups(whole, lr=1.0, lr_scale={"head": 300.0})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base", "lr_scale names 'base'; the trainable groups are head: nothing trains but adapters and the head"),
        (r"blocks\..*", r"names 'blocks.*the trainable groups are head; .* matches no name .*, such as 'head.weight'"),
        ("head(", r"no group is called 'head\(', and 'head\(' is not a regular expression \(missing .*correct the key"),
    ],
)
def test_keys_that_choose_nothing(key, message):
    with pytest.raises(la.AdapterError, match=message):
        parameter_groups(vit(["head"]), lr=1.0, lr_scale={key: 1.0})
