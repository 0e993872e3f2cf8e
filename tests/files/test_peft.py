"""peft's directories: the same function, gradients and names both ways."""

import json
import os
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lit_adapters as la
from language.models import create_model, create_tokenizer
from tests.files.peft_networks import CONFIG, IMAGES, KINDS, NETWORKS, TENSORS, Nested, close, fresh, head, run, trained
from tests.matrix import MODELS, adapted, build, changed_tensors, linear, move


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_peft_loads_what_we_export(name, kind, tmp_path):
    network = trained(name, kind)
    expected = run(name, network)
    la.export_peft(network, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]
    theirs = peft.PeftModel.from_pretrained(fresh(name), tmp_path)
    assert close(run(name, theirs), expected)
    assert load_file(tmp_path / TENSORS).keys() == peft.get_peft_model_state_dict(theirs).keys()
    layers = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert layers == {n for n, _ in la.adapters(network)}

    ours = fresh(name)
    report = la.import_peft(ours, tmp_path)
    assert sum(report.head.values()) or name == "convolutions"
    assert torch.equal(run(name, ours), expected)
    assert ours.get_submodule(head(name)).weight.requires_grad
    theirs.save_pretrained(tmp_path / "theirs")
    again = fresh(name)
    la.import_peft(again, tmp_path / "theirs")
    assert not changed_tensors(ours.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
        ("vit", {"target_modules": r"blocks\.\d\.(attn\.qkv|mlp\.fc1)", "modules_to_save": ["head", "classifier"]}),
        ("convolutions", {"target_modules": ["conv1", "conv2"], "use_dora": True, "lora_alpha": 0}),
    ],
)
def test_we_load_what_peft_saves(name, settings, tmp_path):
    last = {"llama": "1.mlp.down_proj", "gpt2": "h.1.mlp.c_fc", "vit": "1.mlp.fc1", "convolutions": "conv2"}[name]
    patterns = {"rank_pattern": {last: 3}, "alpha_pattern": {re.escape(last): 5, "attn.c_attn": 1}}
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "lora_dropout": 0.1} | settings | patterns)
    theirs = peft.get_peft_model(fresh(name), config).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path)
    ours = fresh(name)
    la.import_peft(ours, tmp_path)
    assert close(run(name, ours), run(name, theirs))
    assert {n: a.rank for n, a in la.adapters(ours)} == {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")
    }
    assert {a.dropout for _, a in la.adapters(ours)} == {0.1}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_peft(name, kind, tmp_path):
    ours = trained(name, kind)
    la.export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(name), tmp_path, is_trainable=True).eval()
    for network in (ours, theirs):
        run(name, network).square().sum().backward()
    reference = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    layers = list(la.adapters(ours))
    for layer, adapter in layers:
        for key, other in {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}.items():
            gradient = getattr(adapter, key).grad
            assert close(gradient, reference[f"{layer}.{other}"].reshape(gradient.shape), 1e-5), f"{layer}.{key}"
        if kind == "dora":
            gradient = adapter.magnitude.grad
            other = reference[f"{layer}.lora_magnitude_vector.default.weight"]
            assert close(gradient, other.reshape(gradient.shape), 1e-5), f"{layer}.magnitude"
    assert len(reference) >= (3 if kind == "dora" else 2) * len(layers) > 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_agrees_with_peft(name, kind, tmp_path):
    ours = trained(name, kind)
    la.export_peft(ours, tmp_path)
    exact = run(name, ours)
    theirs = peft.PeftModel.from_pretrained(fresh(name).to(torch.bfloat16), tmp_path)
    half = run(name, ours.to(torch.bfloat16), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    error, their_error = ((y.float() - exact).abs().max() for y in (half, run(name, theirs, torch.bfloat16)))
    assert error <= max(1.5 * their_error, 0.01 * exact.abs().max())


@pytest.mark.parametrize(
    "methods",
    [
        la.LoRA(rank=2, targets=r"a\.fc1"),
        la.LoRA(rank=2, targets=["fc1"], rank_pattern={r"a\.fc1": 3}),
        [la.LoRA(rank=2, alpha=4.0, targets=r"a\.fc1"), la.LoRA(rank=3, alpha=1.5, targets=r"b\.a\.fc1?")],
        [la.LoRA(rank=2, targets=r"a\.fc1", rslora=True), la.AFALoRA(rank=3, alpha=5.0, targets=["fc"])],
    ],
)
def test_exactly_these_layers_ranks_and_scalings(methods, tmp_path):
    network, x = Nested(), torch.randn(4, 6)
    la.attach(network, methods, train=["head"])
    move(network)
    linear(network)
    la.export_peft(network, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert close(theirs(x), network(x))
    ours = {f"base_model.model.{n}": (a.rank, pytest.approx(a.scaling)) for n, a in la.adapters(network)}
    found = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in found.items()} == ours
    again = Nested()
    la.import_peft(again, tmp_path)
    assert close(again(x), network(x))


def test_a_compiled_model_is_exported_under_its_own_names(tmp_path):
    model = adapted("llama", "lora")
    la.export_peft(model, tmp_path / "plain")
    la.export_peft(torch.compile(model), tmp_path / "compiled")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    la.import_peft(torch.compile(loaded := build("llama")), tmp_path / "plain")
    run_it = MODELS["llama"].run
    torch.testing.assert_close(run_it(loaded.eval()), run_it(model.eval()))


def test_a_module_that_peft_takes_for_the_trained_one_goes_along(tmp_path):
    network, x = Nested(other="ahead"), torch.randn(4, 6)
    la.attach(network, la.LoRA(rank=2, targets=["fc1"]), train=["head"])
    move(network)
    la.export_peft(network, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["head", "ahead"]
    assert close(peft.PeftModel.from_pretrained(Nested(other="ahead"), tmp_path)(x), network(x))
    again = Nested(other="ahead")
    la.import_peft(again, tmp_path)
    assert torch.equal(again(x), network(x))


def test_running_statistics_are_exported(tmp_path):
    network = trained("convolutions").train()
    run("convolutions", network)
    network.eval()
    la.export_peft(network, tmp_path)
    assert not torch.equal(network.norm.running_mean, fresh("convolutions").norm.running_mean)
    assert close(peft.PeftModel.from_pretrained(fresh("convolutions"), tmp_path)(IMAGES), network(IMAGES))
    ours = fresh("convolutions")
    la.import_peft(ours, tmp_path)
    assert torch.equal(ours(IMAGES), network(IMAGES))


def test_an_interrupted_export_leaves_the_earlier_one_or_nothing_that_loads(tmp_path, monkeypatch):
    network = trained("vit")
    la.export_peft(network, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("lit_adapters.files.peft.save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            la.export_peft(network, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    replace = os.replace

    def stopped_before_the_second(source, target):
        if target.name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("lit_adapters.files.atomic.os.replace", stopped_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        la.export_peft(network, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [TENSORS]


@pytest.mark.parametrize("train", [["classifier"], []])
def test_a_classifier_whose_head_stays_loads_too(tmp_path, train):
    """peft looks for a trained head in the file where it knows that the task is a classification."""
    model = build("bert")
    la.attach(model, la.LoRA(rank=2), train=train)
    move(model)
    la.export_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["task_type"] == ("SEQ_CLS" if train else None)
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    torch.testing.assert_close(MODELS["bert"].run(loaded), MODELS["bert"].run(model.eval()), rtol=1e-4, atol=1e-5)


def test_the_auto_class_of_peft_finds_base_and_tokenizer(tmp_path, monkeypatch):
    """By the base's name: here a directory stands for the repository of that name."""
    monkeypatch.chdir(tmp_path)
    tokenizer, model = create_tokenizer("tiny_llama"), create_model("tiny_llama")
    model.save_pretrained("some/base")
    la.attach(model, la.LoRA(rank=2))
    move(model)
    model.config._name_or_path = "some/base"
    (tmp_path / "some").rename(tmp_path / "elsewhere")  # a path of this machine would not be written
    la.export_peft(model, "exported", tokenizer)
    assert AutoTokenizer.from_pretrained("exported").get_vocab() == tokenizer.get_vocab()
    config = json.loads((tmp_path / "exported" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    (tmp_path / "elsewhere").rename(tmp_path / "some")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("exported").eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
