"""Merged models with learned activations as directories that transformers loads without this library."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import lit_adapters as la
from lit_adapters.activations import RationalActivation
from lit_adapters.huggingface import functions, remote_model, save_with_functions
from lit_adapters.model.merge import cast_weights
from lit_adapters.ops import rational
from tests.matrix import ALL, MODELS, adapted, build, move

AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
CASES = [("nora", "llama"), ("nora-anchored", "llama"), ("nora-sum-of-abs", "llama"), ("group_affine", "llama")]
CASES += [("nora++", "gpt2"), ("nora-anchored", "bert")]


def merged(name, method):
    model = adapted(name, method).eval()
    la.merge(model)
    return model


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_directory_loads_and_computes_the_same(tmp_path, method, name):
    model = merged(name, method)
    save_with_functions(model, tmp_path)
    loaded = AUTO[name].from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.testing.assert_close(MODELS[name].run(loaded), MODELS[name].run(model), rtol=1e-5, atol=1e-5)
    assert not any(type(m).__module__.startswith("lit_adapters") for m in loaded.modules())
    again = loaded.state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_an_image_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    la.attach(model, ALL["nora-anchored"])
    move(model)
    la.merge(model)
    save_with_functions(model.eval(), tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HEADS = {"num_key_value_heads": 2}
IMAGE, TEXT = {"image_size": 16, "patch_size": 8}, {"vocab_size": 64, "pad_token_id": 0}
# transformers stores weights of the first three under other names; the next two make their model by an Auto class.
KINDS = {
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", "AutoModelForCausalLM", TEXT),
    "ViTModel": ("ViTConfig", "AutoModel", IMAGE),
    "Dinov2Model": ("Dinov2Config", "AutoModel", IMAGE | {"mlp_ratio": 2}),
    "LlamaForSequenceClassification": ("LlamaConfig", "AutoModelForSequenceClassification", TEXT),
    "Qwen2ForTokenClassification": ("Qwen2Config", "AutoModelForTokenClassification", TEXT | HEADS),
    "BertForMaskedLM": ("BertConfig", "AutoModelForMaskedLM", TEXT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_loads_with_its_values_and_its_loss(tmp_path, kind):
    config, auto, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**SMALL | sizes))
    la.attach(model, la.NoRA(groups=4))
    move(model)
    la.merge(model)
    save_with_functions(model.eval(), tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=True).eval()
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    given = torch.randn(2, 3, 16, 16) if "image_size" in sizes else torch.arange(2, 10).view(2, 4)
    torch.testing.assert_close(loaded(given)[0], model(given)[0], rtol=1e-5, atol=1e-5)
    assert loaded.config is next(m for m in loaded.modules() if m is not loaded and hasattr(m, "config")).config
    if auto != "AutoModel":
        labels = torch.tensor([0, 1]) if "Sequence" in kind else torch.arange(8).view(2, 4) % 2
        torch.testing.assert_close(loaded(given, labels=labels).loss, model(given, labels=labels).loss)


def test_a_save_in_parts_replaces_one_in_one_file(tmp_path):
    save_with_functions(merged("llama", "nora"), tmp_path)
    (tmp_path / "model_of_mine.safetensors").write_text("kept")
    model = merged("llama", "nora-anchored")
    with torch.no_grad():
        model.lm_head.weight += 1
    save_with_functions(model, tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    save_with_functions(merged("llama", "nora"), tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert (tmp_path / "model_of_mine.safetensors").read_text() == "kept"


def test_layers_with_names_like_coefficients_are_cast(tmp_path):
    model = merged("llama", "group_affine")
    save_with_functions(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    patterns = "|".join(loaded._keep_in_fp32_modules_strict)
    assert re.search(patterns, "model.layers.1.mlp.act_fn.before")
    assert not re.search(patterns, "model.before.weight")
    assert loaded.model.layers[1].mlp.act_fn.before.dtype == torch.float32


def test_it_generates_and_saves_again_where_this_package_is_not(tmp_path):
    model = merged("llama", "nora++")
    save_with_functions(model, tmp_path / "first")
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    torch.save(expected, tmp_path / "expected.pt")
    code = """if True:
        import sys, torch
        sys.modules["lit_adapters"] = None  # importing it would fail
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder + "/first", trust_remote_code=True).eval()
        generate = lambda m: m.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        expected = torch.load(folder + "/expected.pt")
        assert torch.equal(generate(model), expected)
        model.save_pretrained(folder + "/second")
        again = AutoModelForCausalLM.from_pretrained(folder + "/second", trust_remote_code=True).eval()
        assert torch.equal(generate(again), expected)
    """
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_half_precision_keeps_the_coefficients(tmp_path):
    model = merged("llama", "nora-anchored")
    exact = model.model.layers[0].mlp.act_fn.numerator.detach().clone()
    cast_weights(model, torch.bfloat16)
    save_with_functions(model, tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded.model.layers[0].mlp.act_fn.numerator, exact)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(MODELS["llama"].run(loaded), MODELS["llama"].run(model), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("form", ["abs-of-sum", "sum-of-abs"])
@pytest.mark.parametrize("degrees", [(5, 4), (3, 4), (4, 4)])
def test_the_formula_agrees_with_ours_everywhere(form, degrees):
    torch.manual_seed(0)
    m, n = degrees
    a, b = torch.randn(4, m + 1), torch.randn(4, n)
    x = torch.cat([torch.linspace(-8, 8, 1000), torch.tensor([0.0, -1e3, 1e3, -1e30, 1e30])])
    x = x.repeat_interleave(8).view(-1, 8)
    own = remote_model.RationalActivation(torch.nn.Identity(), 4, [m, n], form, -1, False)
    found = own.rational(x, a, b)
    torch.testing.assert_close(found, rational(x.double(), a.double(), b.double(), form).float(), rtol=2e-5, atol=2e-5)
    assert torch.isfinite(found[-2:] if m <= n else found[:-2]).all()


def test_channels_in_another_dimension():
    x = torch.randn(2, 8, 5, 5)
    coefficients = torch.randn(4, 6), torch.randn(4, 4)
    ours = RationalActivation(*coefficients, channel_dim=1)
    own = remote_model.RationalActivation(torch.nn.Identity(), 4, [5, 4], "abs-of-sum", 1, False)
    own.load_state_dict(ours.state_dict())
    torch.testing.assert_close(own(x), ours(x))


def test_what_is_refused(tmp_path):
    with pytest.raises(la.AdapterError, match="has an adapter; call"):
        save_with_functions(adapted("llama", "nora"), tmp_path)
    with pytest.raises(la.AdapterError, match="no learned activations"):
        save_with_functions(build("llama"), tmp_path)

    class Own(LlamaForCausalLM):
        pass

    model = merged("llama", "nora")
    model.__class__ = Own
    with pytest.raises(la.AdapterError, match="Own is not a class of transformers"):
        save_with_functions(model, tmp_path)
    with pytest.raises(la.AdapterError, match="save_with_functions writes a directory"):
        save_with_functions(merged("llama", "nora"), tmp_path, push_to_hub=True)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    save_with_functions(merged("llama", "nora"), tmp_path)
    replace = functions.os.replace

    def stopped(source, target):
        if target.name == "model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(functions.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_with_functions(merged("llama", "nora-anchored"), tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert not any(path.name.startswith(".saving") for path in tmp_path.iterdir())


def test_the_file_says_what_it_is(tmp_path):
    save_with_functions(merged("llama", "nora"), tmp_path)
    text = (tmp_path / "modeling_learned_activations.py").read_text()
    assert "lit_adapters" not in text.replace("lit-adapters", "")
    assert "BASE" not in text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama_learned_activations"
    assert config["learned_activations"]["model.layers.0.mlp.act_fn"]["groups"] == 4
