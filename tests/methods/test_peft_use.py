"""peft's methods as ours: configurations, files, shared tensors, other methods beside them, and what is refused."""

import copy
import json
import sys

import peft
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import lit_adapters as la
from lit_adapters.methods.method import to_methods
from lit_adapters.methods.peft_adapter import PeftAdapter
from tests.matrix import build, move
from tests.methods.peft_types import LINEAR, REFUSED, RUNNING, TOKENS, attached, method, network


@pytest.mark.parametrize("kind", REFUSED)
def test_types_that_cannot_run_are_refused_with_the_reason(kind):
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"task_type": "CAUSAL_LM"} if kind == "CPT" else {})
    with pytest.raises(la.AdapterError, match=f"cannot run {kind}: .*{REFUSED[kind]}.*get_peft_model"):
        la.Peft(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(modules_to_save=["head"]), r"modules_to_save=\['head'\] of LORA .* attach\(..., train=...\)"),
        (peft.LoraConfig(trainable_token_indices=[1]), "peft type TRAINABLE_TOKENS"),
        (peft.LoraConfig(target_parameters=["fc1.weight"]), "target_parameters=.*target_modules"),
        (peft.LoraConfig(layer_replication=[(0, 1)]), "layer_replication"),
        (peft.LoraConfig(bias="all"), "bias='all' of LORA"),
        (peft.LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the pretrained weights"),
        (peft.LoraConfig(init_lora_weights="eva"), r"needs peft's own model: use lit_adapters\.LoRA\(start='eva'\)"),
        ({"peft_type": "LORRA"}, "has no peft_type 'LORRA', only .*LORA"),
        ({"peft_type": "ADALORA", "total_step": 0}, "refuses this ADALORA configuration: .*total_step"),
        ({"r": 4}, "dictionary with peft_type"),
        ({"class_path": "peft.PeftModel", "init_args": {}}, "dictionary with peft_type"),
        ("lora", "not 'lora'"),
    ],
)
def test_settings_that_cannot_run_are_named(config, message):
    with pytest.raises(la.AdapterError, match=message):
        la.Peft(config)


@pytest.mark.parametrize("kind", ["LORA", "VERA", "IA3", "BOFT", "LOHA"])
def test_configuration_round_trips(kind):
    config = method(kind)
    plain = config.to_config()
    assert plain["class_path"] == "lit_adapters.Peft"
    assert plain["init_args"]["config"]["peft_type"] == kind
    for restored in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
        assert to_methods(restored) == [config]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapters", type=la.Method | list[la.Method] | None)
    assert parser.instantiate(parser.parse_object({"adapters": plain})).adapters == config
    short = {"class_path": "lit_adapters.Peft", "init_args": {"config": {"peft_type": kind, **LINEAR, **RUNNING[kind]}}}
    assert parser.instantiate(parser.parse_object({"adapters": [short]})).adapters == [config]


def test_a_configuration_in_the_form_of_a_recipe_is_the_same_method():
    """A program that reads a checkpoint compares its method with the recipe's, which stands there in this form."""
    values = {"target_modules": ["fc1"], "feedforward_modules": ["fc1"]}
    form = {"class_path": "peft.IA3Config", "init_args": {"peft_type": None, **values}}
    assert la.Peft(form) == la.Peft(peft.IA3Config(**values))
    recipe = {"class_path": "lit_adapters.Peft", "init_args": {"config": form}}
    assert to_methods(recipe) == [la.Peft(peft.IA3Config(**values))]


def test_adalora_in_its_form_of_a_recipe_takes_total_step_from_the_training():
    values = {"init_r": 4, "target_r": 2, "target_modules": ["q_proj"]}
    form = {"class_path": "peft.AdaLoraConfig", "init_args": {"total_step": None, **values}}
    assert la.Peft(form).config["total_step"] is None
    assert la.Peft(form) == la.Peft({"peft_type": "ADALORA", **values})
    stated = {**form, "init_args": {"total_step": 77, **values}}
    assert la.Peft(stated).config["total_step"] == 77


def test_a_configuration_that_peft_saved_trains_again():
    config = peft.LoraConfig(r=2, inference_mode=True, **LINEAR)
    model = network()
    assert la.attach(model, la.Peft(config)).trainable > 0
    assert config.inference_mode


def test_shared_tensors_stand_once_and_stay_shared(tmp_path):
    model = attached("VERA")
    first, second = dict(la.adapters(model)).values()
    assert "vera_A.default" in first.adapter_tensors()
    assert "vera_A.default" not in second.adapter_tensors()
    assert [k for k in model.state_dict() if "vera_A" in k] == ["fc1.vera_A.default"]
    la.save_adapters(model, tmp_path)
    size = sum(t.numel() for a in (first, second) for t in a.adapter_tensors().values())
    assert (tmp_path / "lit_adapter.safetensors").stat().st_size < 4 * size + 4096
    twin = copy.deepcopy(model).double()
    tuners = [a.tuner for _, a in la.adapters(twin)]
    assert tuners[0].vera_A["default"] is tuners[1].vera_A["default"]
    assert tuners[0].vera_A["default"].dtype == torch.float32


def test_buffers_that_are_in_no_file_keep_their_dtype():
    model = network()
    la.attach(model, la.Peft(peft.VeraConfig(r=4, save_projection=False, **LINEAR)))
    assert not [k for k in model.state_dict() if "vera_A" in k]
    model.to(torch.bfloat16)
    assert model(TOKENS).dtype == torch.bfloat16
    assert model.get_buffer("fc1.vera_A.default").dtype == torch.float32


def test_tensors_outside_the_state_of_peft_are_saved():
    model = attached("SHIRA")
    assert "fc1.shira_indices.default" in model.state_dict()


def test_strict_loading_forgives_frozen_base_keys_only():
    model = attached("RANDLORA")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    kept = {k: v for k, v in model.state_dict().items() if k not in frozen}
    model.load_state_dict(kept)
    del kept["fc2.randlora_lambda.default"]
    with pytest.raises(RuntimeError, match=r"fc2\.randlora_lambda\.default"):
        model.load_state_dict(kept)


def test_train_and_eval_reach_the_layers():
    model = network()
    la.attach(model, la.Peft(peft.LoraConfig(r=2, lora_dropout=0.5, use_dora=True, **LINEAR)))
    move(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    la.verify(model, TOKENS)
    assert not torch.equal(model(TOKENS), model(TOKENS))


def test_compiles_without_breaks():
    model = attached("LORA")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_beside_another_method():
    model = build("llama")
    config = la.Peft(peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    report = la.attach(model, [la.NoRA(groups=4), config])
    assert [m for _, m, _ in report.adapters].count("peft") == 4
    assert [m for _, m, _ in report.adapters].count("nora") == 2
    merged = la.merge(model)
    assert (len(merged.merged), len(merged.kept)) == (4, 2)
    assert not any(isinstance(m, PeftAdapter) for m in model.modules())
    with pytest.raises(la.AdapterError, match=r"LoRA and Peft both want 'model.layers.0.self_attn.q_proj'"):
        la.attach(build("llama"), [la.LoRA(rank=2), config])


def test_targets_by_the_architecture():
    """peft knows what to adapt in the models of transformers."""
    report = la.attach(build("llama"), la.Peft(peft.LoraConfig(r=2)))
    assert {n.rpartition(".")[2] for n, _, _ in report.adapters} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (peft.LoraConfig(target_modules=["nothing"]), la.TargetsNotFound, "nothing"),
        (peft.LoraConfig(), la.AdapterError, "peft cannot inject LORA: .*target_modules"),
        # The first layer can carry it, the second cannot: peft stops in the middle.
        (
            peft.VBLoRAConfig(vector_length=16, target_modules=["fc1", "head"]),
            la.AdapterError,
            "inject VBLORA.*divisible",
        ),
        (peft.LoraConfig(target_modules=["attention"]), la.AdapterError, "inside of 'attention' for LORA"),
    ],
)
def test_after_an_error_the_model_is_as_before(config, error, message):
    model = network()
    model.attention = nn.MultiheadAttention(16, 2)
    model.fc2.weight.requires_grad_(False)
    parts, attributes = dict(model.named_modules()), set(vars(model))
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        la.attach(model, la.Peft(config))
    assert dict(model.named_modules()) == parts
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert set(vars(model)) == attributes


def test_a_model_of_peft_is_refused():
    model = peft.get_peft_model(network(), peft.LoraConfig(**LINEAR))
    with pytest.raises(la.AdapterError, match=r"'base_model.model.fc1' is a layer of peft already; .*unload\(\)"):
        la.attach(model, method("VERA"))


def test_adalora_needs_no_number_of_steps():
    config = la.Peft({"peft_type": "ADALORA", **LINEAR})
    assert config.config["total_step"] is None
    assert to_methods(json.loads(json.dumps(config.to_config()))) == [config]
    la.attach(network(), config)


@pytest.mark.parametrize("kept", [[True], [1, 0, 1, 0], "all"])
def test_ranks_of_adalora_that_do_not_fit_are_refused(kept):
    config = {"peft_type": "ADALORA", **LINEAR, **RUNNING["ADALORA"], "rank_pattern": {"fc1.lora_E": kept}}
    with pytest.raises(la.AdapterError, match=r"rank_pattern of ADALORA has .* for 'fc1', and must have 4 times true"):
        la.attach(network(), la.Peft(config))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(la.AdapterError, match=r"pip install lit-adapters\[peft\]"):
        la.Peft({"peft_type": "LORA"})
