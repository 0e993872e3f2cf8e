"""Our methods in peft: what its own tests ask of every method, and equality with `lit_adapters.attach`."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from lit_adapters.huggingface import peft_tuners
from lit_adapters.huggingface.peft_layer import AdaptedLayer
from tests.matrix import MODELS, build, move
from tests.tiers import fast_only

CONFIGS = {
    "nora": (peft_tuners.NoRAConfig, {"groups": 4}),
    "nora-anchored": (peft_tuners.NoRAConfig, {"groups": 4, "rank": 2, "base": "anchored"}),
    "nora++": (
        peft_tuners.NoRAPlusPlusConfig,
        {"nora": la.NoRA(groups=4, base="anchored"), "lora": la.LoRA(rank=2)},
    ),
    "loran": (peft_tuners.LoRANConfig, {"rank": 2, "target_modules": ["q_proj", "v_proj"]}),
    "afa": (peft_tuners.AFALoRAConfig, {"rank": 2, "activation": "silu", "target_modules": "all-linear"}),
    "group_affine": (peft_tuners.GroupAffineConfig, {"groups": 4}),
    "lora2": (peft_tuners.LoRA2Config, {"width": 3, "rank": 2, "alpha": 400.0, "target_modules": r".*\.[qk]_proj"}),
    "nested_lora": (peft_tuners.NestedLoRAConfig, {"rank": 3, "inner_rank": 2, "init": "svd"}),
}
ALL = list(CONFIGS)
FAST = ["nora-anchored", "nora++", "afa"]
MERGES_FULLY = ("loran", "lora2", "nested_lora")
run = MODELS["llama"].run


def config(name, **changes):
    kind, settings = CONFIGS[name]
    return kind(**settings | {"task_type": "CAUSAL_LM"} | changes)


def tuned(name, seed=0, **changes):
    """The tiny LLaMA in peft, with every adapter parameter off its start, in eval mode."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(build("llama"), config(name, **changes))
    move(model, seed)
    return model.eval()


def linear(model):
    """End the annealing."""
    la.set_progress(model, 1.0)
    return model


every = pytest.mark.parametrize("name", fast_only(FAST, ALL))


@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_attach_does_with_the_same_values(name):
    model = tuned(name)
    own = build("llama")
    la.attach(own, config(name).method())
    pairs = {n.removeprefix("base_model.model.").removesuffix(".lit_adapter.default"): a for n, a in la.adapters(model)}
    adapters = dict(la.adapters(own))
    assert pairs.keys() == adapters.keys()
    for place, adapter in adapters.items():
        adapter.load_state_dict({**adapter.state_dict(), **pairs[place].state_dict()})
    own.eval()
    assert torch.equal(run(model), run(own))
    for training in (model, own):
        training.train()
        run(training).square().mean().backward()
    for place, adapter in adapters.items():
        for key, parameter in adapter.adapter_parameters().items():
            assert torch.equal(parameter.grad, pairs[place].adapter_parameters()[key].grad), (place, key)


@every
def test_a_file_comes_back(tmp_path, name):
    model = tuned(name)
    expected = run(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == f"LIT_{config(name).method_class.__name__.upper()}"
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(again.eval()), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.peft_config["default"].method() == model.peft_config["default"].method()
    lazy = peft.PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=True)
    state, lazy_state = model.state_dict(), lazy.state_dict()
    assert all(torch.equal(lazy_state[key], values) for key, values in state.items())
    # Its tensors lie elsewhere in memory, where some processors add up in another order.
    torch.testing.assert_close(run(lazy.eval()), expected, rtol=1e-6, atol=1e-6)
    onward = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert {n for n, p in onward.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@every
def test_training_moves_the_adapter_alone(name):
    model = tuned(name)
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model).square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".lit_adapter.default." in n for n in changed)


@every
def test_disabling_gives_the_pretrained_model(name):
    model, base = tuned(name), run(build("llama").eval())
    adapted = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), adapted)
    assert not torch.equal(adapted, base)


@every
def test_several_adapters(tmp_path, name):
    model = tuned(name)
    first = run(model)
    model.add_adapter("other", config(name))
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".other." in n for n in trained)
    move(model, 7)
    second = run(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(run(model), first)

    model.save_pretrained(tmp_path, selected_adapters=["other"])
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "other", adapter_name="loaded")
    assert torch.equal(run(again.eval()), second)
    again.load_adapter(tmp_path / "other", adapter_name="twice")
    again.set_adapter("twice")
    assert torch.equal(run(again.eval()), second)

    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(run(model), second)
    assert not any(".default" in n for n in model.state_dict())
    model.add_adapter("third", config(name))
    model.base_model.set_adapter(["other", "third"])
    with pytest.raises(la.AdapterError, match="are active at the same layer"):
        run(model)


@every
def test_merging(name):
    model = linear(tuned(name))
    expected = run(model)
    base = {n: p.clone() for n, p in model.named_parameters() if ".lit_adapter." not in n}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, AdaptedLayer) for m in merged.modules())
    assert not list(la.adapters(merged))


@pytest.mark.parametrize("name", ALL)
def test_a_merged_model_is_saved_as_a_whole_or_not_at_all(tmp_path, name):
    model = linear(tuned(name))
    merged = model.merge_and_unload()
    if name in (*MERGES_FULLY, "afa"):
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(run(again.eval()), run(merged.eval()))
    else:
        with pytest.raises(la.AdapterError, match="without its learned functions"):
            merged.save_pretrained(tmp_path)


def test_a_nonlinear_adapter_does_not_merge():
    model = tuned("afa")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(la.AdapterError, match="beta"):
            merge()


def test_a_merged_weight_that_is_not_finite_is_refused():
    model = tuned("loran")
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))
    with torch.no_grad():
        layer.lit_adapter["default"].lora_A.fill_(float("nan"))
    with pytest.raises(ValueError, match="is not finite"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged


@every
def test_unloading_gives_the_pretrained_model(name):
    base = run(build("llama").eval())
    assert torch.equal(run(tuned(name).unload().eval()), base)


@every
def test_copies_and_pickles(name):
    model = tuned(name)
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), expected)
        move(other, 9)
        assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)


@every
def test_generation(name):
    model = tuned(name)
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)


@every
def test_half_precision_and_checkpointing(name):
    model = peft.get_peft_model(build("llama", torch.bfloat16), config(name))
    own = {n: p.dtype for n, p in model.named_parameters() if ".lit_adapter." in n}
    assert set(own.values()) == {torch.float32}
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    output = run(model, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


@every
def test_injection_without_a_peft_model(name):
    model = build("llama")
    peft.inject_adapter_in_model(config(name), model)
    move(model)
    expected = run(model.eval())
    state = peft.get_peft_model_state_dict(model)
    other = build("llama")
    peft.inject_adapter_in_model(config(name), other)
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(run(other.eval()), expected)


def test_modules_to_save(tmp_path):
    model = tuned("nora", modules_to_save=["norm"])
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(again.eval()), run(model))


def test_the_auto_class_finds_the_base(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config("nora++"))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(run(again.eval()), run(model.eval()))


def test_targets_are_found_as_by_attach():
    model = tuned("nora")
    assert model.peft_config["default"].target_modules == [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    chosen = tuned("nora", target_modules=["layers.1.mlp.act_fn"])
    assert [n for n, m in chosen.named_modules() if isinstance(m, AdaptedLayer)] == [
        "base_model.model.model.layers.1.mlp.act_fn"
    ]
    without = tuned("loran", target_modules=None, exclude_modules=["q_proj"])
    names = without.peft_config["default"].target_modules
    assert names
    assert not any("q_proj" in n or "lm_head" in n for n in names)


def test_a_saved_configuration_adapts_these_layers_alone(tmp_path):
    """Though the name of one of them is also the end of another's."""

    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(4, 4), "inner": nn.ModuleDict({"a": nn.Linear(4, 4)})})

    settings = peft_tuners.LoRANConfig(rank=2, target_modules=r"a")
    model = peft.get_peft_model(network(), settings)
    adapted = [name for name, _ in la.adapters(model)]
    assert len(adapted) == 1
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(network(), tmp_path)
    assert [name for name, _ in la.adapters(again)] == adapted


def test_an_embedding_that_is_tied_to_the_head_is_not_changed_by_merging():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, tie_word_embeddings=True))
    before = base.model.embed_tokens.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's on tied weights
        model = peft.get_peft_model(base, peft_tuners.AFALoRAConfig(rank=2, target_modules=["lm_head"]))
    move(model)
    linear(model)
    with pytest.raises(la.AdapterError, match=r"'lm_head' and 'model\.embed_tokens' have one weight.*untie them"):
        model.merge_and_unload()
    assert torch.equal(base.model.embed_tokens.weight, before)
    assert model.unload() is not None


def test_excluding_modules_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = tuned("loran", target_modules=None, exclude_modules=["q_proj"])
    assert not any("q_proj" in name for name, _ in la.adapters(model))


@pytest.mark.parametrize("name", ["nora", "loran", "nora++"])
def test_a_model_of_many_layers(tmp_path, name):
    """From twenty targets on, peft rewrites the list of their names."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=22, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    settings = config(name) if name == "nora++" else config(name, target_modules=None)
    method = settings.method()
    model = peft.get_peft_model(copy.deepcopy(base), settings)
    move(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(run(again), run(model.eval()))
    own = copy.deepcopy(base)
    la.attach(own, method)
    assert len(list(la.adapters(own))) == len(list(la.adapters(model)))


class Shared(nn.Module):
    """One function at two places, and one layer at two places."""

    def __init__(self):
        super().__init__()
        act, self.fc1 = nn.GELU(), nn.Linear(8, 16)
        self.first, self.second = nn.Sequential(nn.Linear(4, 8), act), nn.Sequential(self.fc1, act)
        self.again = self.fc1

    def forward(self, x):
        return self.second(self.first(x))


def test_a_function_at_two_places_becomes_two():
    model = peft.get_peft_model(Shared(), peft_tuners.NoRAConfig(groups=4, target_modules=["first.1", "second.1"]))
    assert len({id(a) for _, a in la.adapters(model)}) == 2
    move(model)
    assert model.base_model.model.first[1] is not model.base_model.model.second[1]
    with pytest.raises(la.AdapterError, match="are one and the same layer, which peft would adapt once"):
        peft.get_peft_model(Shared(), peft_tuners.LoRANConfig(rank=2, target_modules=["fc1", "second.0", "again"]))


def test_what_is_refused():
    with pytest.raises(la.AdapterError, match="rank"):
        peft_tuners.NoRAConfig(rank=0)
    with pytest.raises(la.AdapterError, match="has several parts"):
        peft_tuners.NoRAPlusPlusConfig(target_modules=["q_proj"])
    with pytest.raises(la.AdapterError, match="must be a list of name suffixes"):
        peft_tuners.LoRANConfig(exclude_modules="q_proj")
    with pytest.raises(la.TargetsNotFound, match="nothing"):
        peft.get_peft_model(build("llama"), peft_tuners.LoRANConfig(target_modules=["nothing"]))
    with pytest.raises(la.AdapterError, match=r"LIT_NORA is a method of this library: give attach lit_adapters\.NoRA,"):
        la.Peft(config("nora"))
    attached = build("llama")
    la.attach(attached, la.LoRA(rank=2))
    with pytest.raises(la.AdapterError, match=r"has an adapter of lit_adapters\.attach, which peft would freeze"):
        peft.get_peft_model(attached, config("nora"))
    ids = torch.tensor([[1, 2, 3]])
    for call in (tuned("nora"), tuned("nora").generate):
        with pytest.raises(la.AdapterError, match="cannot differ within a batch"):
            call(input_ids=ids, adapter_names=["default"])
