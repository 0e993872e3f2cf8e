"""What peft's format cannot say, and directories that cannot be read, are refused; nothing has changed then."""

import copy
import json
import re
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

import lit_adapters as la
from tests.files.peft_networks import CONFIG, TENSORS, Nested, fresh, trained
from tests.matrix import changed_tensors


def nested(methods, train=(), **settings) -> nn.Module:
    network = Nested(**settings)
    la.attach(network, methods, train)
    return network


def merged() -> nn.Module:
    network = nested(la.LoRA(rank=2))
    la.merge(network, unload=False)
    return network


def broken() -> nn.Module:
    network = nested(la.LoRA(rank=2))
    with torch.no_grad():
        network.head.lora_A[0, 0] = float("nan")
    return network


def twice() -> nn.Module:
    network = Nested()
    network.b["a"]["fc"] = network.a["fc1"]
    la.attach(network, la.LoRA(rank=2, targets=["fc1", "fc"]))
    return network


def nonlinear() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    la.attach(network, la.NoRA(groups=2))
    return network


def rewritten() -> nn.Module:
    """Of an architecture in which peft takes up_proj and the like for the experts' of an older transformers."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    network = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, num_hidden_layers=1, pad_token_id=0))
    la.attach(network, la.LoRA(rank=2, targets=["up_proj", "gate_proj"]))
    return network


def dilated() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2))
    la.attach(network, la.LoRA(rank=2, targets=["0"]))
    return network


LORA = la.LoRA(rank=2, targets=["fc1"])


def alike() -> nn.Module:
    """With a layer whose name the one of a trained module matches, read as an expression."""
    network = nn.ModuleDict({"part": nn.ModuleDict({"1": nn.Linear(6, 6), "2": nn.Linear(6, 6)})})
    network["part_1"] = nn.ModuleDict({"fc1": nn.Linear(6, 6)})
    la.attach(network, LORA, train=["part.1"])
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nested(la.LoRAN(rank=2)), "'a.fc1' has loran, which the LoRA format of peft cannot express"),
        (nonlinear, "'1' has nora"),
        (lambda: nested([LORA, la.DoRA(rank=2, targets=["head"])]), "'head' has DoRA, 'a.fc1' has not"),
        (lambda: nested(la.AFALoRA(rank=2)), "'a.fc1' is nonlinear at beta = 1"),
        (lambda: nested([LORA, la.LoRA(rank=2, targets=["head"], dropout=0.1)]), r"one lora_dropout .*\[0.0, 0.1\]"),
        (merged, r"'a.fc1' is merged; call lit_adapters.unmerge"),
        (broken, "'base_model.model.head.lora_A.weight' is not finite; nothing was written"),
        (twice, "'a.fc1' stands at several places"),
        (rewritten, "in Glm4MoeForCausalLM peft would adapt the parameters gate_up_proj in place"),
        (dilated, r"'0' has dilation \(2, 2\)"),
        (lambda: nested([], ["head"]), "no adapters"),
        (Nested, "no adapters of its own"),
        (lambda: nested(LORA, ["head.weight"]), "'head.weight' trains, but not all of its module"),
        (
            lambda: nested(la.LoRA(rank=2, targets=["ahead"]), "head", other="ahead"),
            r"take the adapted 'ahead' .*\('ahead'\)",
        ),
        (alike, r"take the adapted 'part_1.fc1' for a trained module \('part.1'\)"),
    ],
)
def test_what_the_format_cannot_say_is_refused(make, message, tmp_path):
    network = make()
    with pytest.raises(la.AdapterError, match=message):
        la.export_peft(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    la.export_peft(trained("vit"), directory)
    return directory


def damaged(saved, directory, config=None, tensors=None):
    """A copy with settings replaced, and the tensors as `tensors` leaves them."""
    values = load_file(saved / TENSORS)
    if tensors:
        tensors(values)
    save_file(values, directory / TENSORS)
    settings = json.loads((saved / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(settings | (config or {})))
    return directory


def assert_refused(directory, message, network=None):
    network = network or fresh("vit")
    before = copy.deepcopy(network.state_dict())
    flags = {n: p.requires_grad for n, p in network.named_parameters()}
    with pytest.raises(la.AdapterError, match=message):
        la.import_peft(network, directory)
    assert not changed_tensors(before, network.state_dict())
    assert {n: p.requires_grad for n, p in network.named_parameters()} == flags
    assert not list(la.adapters(network))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "all"}, "bias='all' has no counterpart"),
        ({"lora_bias": True}, "lora_bias=True has no counterpart"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base .*convert"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"peft_type": "LOHA"}, "holds LOHA; only LORA can be imported"),
        ({"brand_new": 3}, rf"peft {re.escape(peft.__version__)} does not know brand_new=3; update it"),
        ({"r": 5}, "'blocks.*' has rank 2, but 5 in"),
        ({"use_dora": True}, "'blocks.*lora_magnitude_vector' is absent there and 64 here"),
        ({"modules_to_save": None}, "'head.bias' is 5 there and absent here"),
        ({"modules_to_save": 3}, "modules_to_save is 3, and must be"),
        ({"modules_to_save": [3]}, r"modules_to_save is \[3\], and must be"),
        ({"r": "2"}, "r is '2', and must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None, and must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, and must be a number"),
        ({"alpha_pattern": {"fc1": float("nan")}}, "alpha_pattern is .*nan.*, and must be"),
        ({"alpha_pattern": {"fc1": "x"}}, "alpha_pattern is .*, and must be"),
        ({"alpha_pattern": [["fc1", 2]]}, "alpha_pattern is .*, and must be"),
        ({"rank_pattern": 0.5}, "rank_pattern is 0.5, and must be"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is not a regular expression"),
        ({"rank_pattern": {"(([a-z0-9_.]+)+)+X": 2}}, "rank_pattern .* may take for ever"),
        ({"alpha_pattern": {"(([a-z0-9_.]+)+)+X": 2}}, "alpha_pattern .* may take for ever"),
        ({"peft_type": ["LORA"] * 10_000}, r"holds \['LORA', .{,60}; only LORA"),
        ({"brand_new": "x" * 100_000}, "does not know brand_new='x{,60}[.]{3}x{,60}'; update it$"),
        ({"modules_to_save": ["norm", "head"]}, "'norm.bias' is absent there and 64 here"),
    ],
)
def test_settings_without_a_counterpart_are_refused(config, message, saved, tmp_path):
    assert_refused(damaged(saved, tmp_path, config), message)


KEY = "base_model.model.blocks.0.mlp.fc1"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), r"'blocks.0.mlp.fc1.lora_B.weight' is absent there and .* here"),
        (lambda t: t.pop("base_model.model.head.bias"), "'head.bias' is absent there and 5 here"),
        (lambda t: t.update({f"{KEY}.bias": torch.ones(3)}), "'blocks.0.mlp.fc1.bias' is 3 there and absent here"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(2, 3)}), r"lora_B.weight' is 2x3 there"),
        (
            lambda t: t.update({f"{KEY}.lora_embedding_A": torch.ones(2)}),
            r"lora_embedding_A' is not a tensor of a LoRA",
        ),
        (lambda t: t.update({f"{KEY}.lora_A.bias": torch.ones(2)}), r"lora_A.bias' is not a tensor of a LoRA"),
        (lambda t: t.update({"head.bias": torch.ones(5)}), r"'head.bias' is not a tensor of a LoRA"),
        (lambda t: t.clear(), "adapts no layer"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.tensor(1.0)}), r"lora_A.weight' is not a tensor of a LoRA"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((2, 64), 1e300, dtype=torch.float64)}),
            "not finite in torch.float32",
        ),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((2, 64), float("nan"))}), "not finite in"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message, saved, tmp_path):
    assert_refused(damaged(saved, tmp_path, tensors=tensors), message)


def test_files_that_are_missing_or_torn(saved, tmp_path):
    assert_refused(tmp_path / "nowhere", "adapter_config.json does not exist")
    directory = damaged(saved, tmp_path)
    (directory / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:-100])
    assert_refused(directory, "is torn, or was not saved by peft")
    (directory / TENSORS).rename(directory / "adapter_model.bin")
    assert_refused(directory, r"adapter_model.safetensors does not exist.*adapter_model.bin is a pickle")
    damaged(saved, tmp_path)
    for text in ("{", "[]", "{}", "[" * 100_000, "null"):
        (directory / CONFIG).write_text(text)
        assert_refused(directory, "is torn, or was not saved by peft")


def test_models_that_do_not_fit(saved):
    assert_refused(saved, r"adapts 'blocks.\S+', which ConvNet has not", fresh("convolutions"))
    with pytest.raises(la.AdapterError, match="is on the meta device"):
        la.import_peft(fresh("vit").to("meta"), saved)
    adapted = trained("vit")
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.import_peft(adapted, saved)


def test_without_peft(monkeypatch, tmp_path):
    network = trained("vit")
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (la.export_peft, la.import_peft):
        with pytest.raises(la.AdapterError, match=r"pip install lit-adapters\[peft\]"):
            call(network, tmp_path)
