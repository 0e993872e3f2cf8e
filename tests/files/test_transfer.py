"""Adapters for a model with another head, image size or vocabulary, and for names with other prefixes."""

import json

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from lit_adapters.files.transfer import named_as_in
from tests.matrix import METHODS, MODELS, adapted, build


def vit(size=32, classes=5):
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=size, depth=2, num_classes=classes).eval()


def tensors(model):
    return {f"{n}.{k}": t.clone() for n, a in la.adapters(model) for k, t in a.adapter_tensors().items()}


@pytest.mark.filterwarnings("ignore:.*still nonlinear:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_another_head_and_image_size(method, tmp_path):
    model = adapted("vit", method, train=["head"])
    la.save_adapters(model, tmp_path)
    other = vit(64, 7)
    head = other.head.weight.detach().clone()
    with pytest.raises(la.AdapterError, match="strict='shapes' takes what fits another one"):
        la.load_adapters(other, tmp_path)
    assert not list(la.adapters(other))
    with pytest.warns(UserWarning, match=r"'head\.bias', 'head\.weight' stay as they are in the model"):
        report = la.load_adapters(other, tmp_path, strict="shapes")
    assert report.left_out == ["head.bias", "head.weight"]
    assert "left out" in str(report)
    assert torch.equal(other.head.weight, head)
    assert other.head.weight.requires_grad
    expected = tensors(model)
    assert tensors(other).keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in tensors(other).items())
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_another_vocabulary(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model, other = (LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=size)) for size in (40, 48))
    la.attach(model, la.LoRA(rank=2, targets=["q_proj", "lm_head"]))
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            adapter.lora_B.fill_(0.5)
    la.save_adapters(model, tmp_path)
    with pytest.warns(UserWarning, match=r"'lm_head\.lora_A', 'lm_head\.lora_B' stay as they are"):
        la.load_adapters(other, tmp_path, strict="shapes")
    assert (other.lm_head.lora_B == 0).all()
    assert (other.model.layers[0].self_attn.q_proj.lora_B == 0.5).all()
    assert other(torch.arange(48)[None]).logits.shape == (1, 48, 48)


def test_a_start_from_the_weight_that_stays(tmp_path):
    """Adapters that do not fit start from the model's own weight."""

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, width)

        def forward(self, x):
            return self.second(self.first(x))

    model, other = Net(6), Net(10)
    la.attach(model, la.LoRA(rank=2, start="pissa"))
    la.save_adapters(model, tmp_path)
    x = torch.randn(3, 8)
    before = other.second(x)
    with pytest.warns(UserWarning, match="does not fit everywhere"):
        report = la.load_adapters(other, tmp_path, strict="shapes")
    assert all(name.startswith("second.") for name in report.left_out)
    torch.testing.assert_close(other.second(x), before)
    assert other.second.start_A.abs().sum() > 0


def test_the_same_model_loads_whole(tmp_path, recwarn):
    model = adapted("bert", "lora", train=["classifier"])
    la.save_adapters(model, tmp_path)
    other = build("bert").eval()
    assert la.load_adapters(other, tmp_path, strict="shapes").left_out == []
    assert not [w for w in recwarn if "fit everywhere" in str(w.message)]
    with torch.no_grad():
        assert torch.equal(MODELS["bert"].run(other), MODELS["bert"].run(model.eval()))


def test_a_head_of_another_name(tmp_path):
    model = adapted("vit", "lora", train=["head"])
    la.save_adapters(model, tmp_path)
    other = timm.create_model("test_vit", img_size=32, depth=2, num_classes=0)
    other.classifier = nn.Linear(other.num_features, 3)
    with pytest.warns(UserWarning, match="stay as they are"):
        report = la.load_adapters(other, tmp_path, strict="shapes")
    assert {"head.weight", "head.bias"} <= set(report.left_out)
    assert not other.classifier.weight.requires_grad


@pytest.mark.parametrize("strict", [False, None, "names", 1])
def test_other_values_of_strict_are_refused(strict, tmp_path):
    la.save_adapters(adapted("bert", "lora"), tmp_path)
    with pytest.raises(la.AdapterError, match="must be True, or 'shapes'"):
        la.load_adapters(build("bert"), tmp_path, strict=strict)


def test_nothing_fits(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2, targets=["0"]))
    la.save_adapters(model, tmp_path)
    other = nn.Sequential(nn.Linear(9, 9))
    with pytest.raises(la.AdapterError, match="none of the 1 adapters fits this model, '0' first"):
        la.load_adapters(other, tmp_path, strict="shapes")
    assert type(other[0]) is nn.Linear


@pytest.mark.parametrize("method", ["lora", "nora++", "dense_lora"])
def test_a_compiled_model_is_the_model_inside(method, tmp_path):
    model = build("llama").eval()
    compiled = torch.compile(model, backend="eager")
    la.attach(compiled, METHODS[method])
    assert la.adapter_names(compiled) == la.adapter_names(model) == ["default"]
    la.save_adapters(compiled, tmp_path)
    names = json.loads((tmp_path / "lit_adapter.json").read_text())["adapters"]
    assert not [n for n in names if "_orig_mod" in n]
    other = build("llama").eval()
    la.load_adapters(torch.compile(other, backend="eager"), tmp_path)
    with torch.no_grad():
        expected = MODELS["llama"].run(model)
        assert torch.equal(MODELS["llama"].run(other), expected)
        la.use(compiled, [])
        assert torch.equal(MODELS["llama"].run(model), MODELS["llama"].run(build("llama").eval()))
        la.use(compiled, "default")
        assert torch.equal(MODELS["llama"].run(model), expected)
    la.detach(compiled)
    assert not list(la.adapters(model))


class Wrapper(nn.Module):
    """Gives names a prefix, as torch.compile and DistributedDataParallel did when adapters went into the wrapper."""

    def __init__(self, prefix, model):
        super().__init__()
        self.add_module(prefix, model)


@pytest.mark.parametrize("prefixes", [["_orig_mod"], ["module"], ["_orig_mod", "module"], ["module", "_orig_mod"]])
@pytest.mark.parametrize("targets", ["all-linear", ["0.self_attn.q_proj", "mlp.up_proj"]])
def test_files_with_the_prefixes_of_wrappers(prefixes, targets, tmp_path):
    wrapped = build("llama").eval()
    for prefix in prefixes:
        wrapped = Wrapper(prefix, wrapped)
    full = [n for n, m in wrapped.named_modules() if n.endswith("layers.0.self_attn.q_proj")]
    method = la.LoRA(rank=2, targets=targets if isinstance(targets, str) else [*targets, *full])
    la.attach(wrapped, method, train=["norm.weight"])
    with torch.no_grad():
        for _, adapter in la.adapters(wrapped):
            adapter.lora_B.normal_()
    la.save_adapters(wrapped, tmp_path)
    model = build("llama").eval()
    la.load_adapters(model, tmp_path)
    inside = wrapped
    for prefix in reversed(prefixes):
        inside = getattr(inside, prefix)
    with torch.no_grad():
        assert torch.equal(MODELS["llama"].run(model), MODELS["llama"].run(inside))
    again = build("llama")
    for prefix in prefixes:
        again = Wrapper(prefix, again)
    la.load_adapters(again, tmp_path)  # names as they are


def test_names_of_a_compiled_model_in_a_header_without_settings():
    header = {
        "methods": [{"class_path": "lit_adapters.BitFit"}],
        "adapters": {"module.a": "bitfit"},
        "train": [],
        "base": {"shapes": {"module.a.weight": "2x2"}},
    }
    renamed, tensors = named_as_in(header, {"module.a.delta": torch.zeros(2)}, ["a.weight"])
    assert renamed["adapters"] == {"a": "bitfit"}
    assert list(tensors) == ["a.delta"]
