"""What holds for every method on every model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.methods.nora import NoRAActivation
from tests.matrix import ALL, CASES, FITTED, MODELS, UNMERGEABLE, adapted, build, changed_tensors, linear, move
from tests.tiers import fast_only

each_method = pytest.mark.parametrize("method", ALL)


def cases(wanted=lambda method: True):
    """Every case of the matrix whose method is `wanted`; bfloat16 on more than one encoder and decoder is slow."""
    chosen = [case for case in CASES if wanted(case[0])]
    ids = [f"{m}-{n}" + ("-bf16" if dtype == torch.bfloat16 else "") for m, n, dtype in chosen]
    fast = [case for case in chosen if case[2] == torch.float32 or case[1] in ("vit", "llama")]
    return pytest.mark.parametrize(("method", "name", "dtype"), fast_only(fast, chosen), ids=ids)


each_case = cases()


def step(network: nn.Module, name: str, dtype: torch.dtype = torch.float32, steps: int = 1) -> None:
    """Optimiser steps on some loss."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = MODELS[name].run(network, dtype).float()
        (logits - torch.linspace(-1, 1, logits.shape[-1])).square().mean().backward()
        optimizer.step()


@cases(lambda method: method not in FITTED)
def test_start_is_the_pretrained_function_bit_for_bit(method, name, dtype):
    base, network = build(name, dtype), adapted(name, method, dtype, seed=None)
    assert torch.equal(MODELS[name].run(network, dtype), MODELS[name].run(base, dtype))


@cases(lambda method: method in FITTED)
def test_start_of_a_fit_is_within_its_error_on_its_interval(method, name, dtype):
    network, seen = adapted(name, method, dtype, seed=None), []
    for _, adapter in la.adapters(network):
        if isinstance(adapter, NoRAActivation):
            adapter.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y)))
    MODELS[name].run(network, dtype)
    assert seen
    for module, x, y in seen:
        low, high = module.fit_range.tolist()
        inside = (x >= low) & (x <= high)
        assert inside.float().mean() > 0.99
        error = (y.double() - module.base(x.double()))[inside].abs().max()
        assert error <= 0.0038 + torch.finfo(dtype).eps * y.abs().max()  # GELU's fit is the coarsest in these models


@each_case
def test_what_is_declared_trains_and_nothing_else(method, name, dtype):
    head = MODELS[name].head
    network = adapted(name, method, dtype, train=[head], seed=None)
    declared = {f"{n}.{k}" for n, adapter in la.adapters(network) for k in adapter.adapter_parameters()}
    declared |= {n for n, _ in build(name).named_parameters() if n.startswith(f"{head}.")}
    assert {n for n, p in network.named_parameters() if p.requires_grad} == declared

    frozen = {n: p.detach().clone() for n, p in network.named_parameters() if n not in declared}
    step(network, name, dtype, steps=2)
    after = dict(network.named_parameters())
    assert not changed_tensors(frozen, {n: after[n] for n in frozen})
    assert {n for n in declared if after[n].grad is None or not after[n].grad.any()} == set()


@each_case
def test_disabled_is_the_pretrained_function_bit_for_bit(method, name, dtype):
    network, expected = adapted(name, method, dtype), MODELS[name].run(build(name, dtype), dtype)
    changed = MODELS[name].run(network, dtype)
    with la.disabled(network):
        assert torch.equal(MODELS[name].run(network, dtype), expected)
    assert torch.equal(MODELS[name].run(network, dtype), changed)
    assert not torch.equal(changed, expected)


@each_case
def test_save_and_load_bit_for_bit(method, name, dtype, tmp_path):
    network = adapted(name, method, dtype, train=[MODELS[name].head], seed=None)
    step(network, name, dtype, steps=2)
    la.save_adapters(network, tmp_path)
    loaded = build(name, dtype)
    report = la.load_adapters(loaded, tmp_path)
    assert not changed_tensors(network.state_dict(), loaded.state_dict())
    assert torch.equal(MODELS[name].run(loaded, dtype), MODELS[name].run(network, dtype))
    assert report.trainable == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in network.named_parameters() if p.requires_grad
    }


@cases(lambda method: method not in UNMERGEABLE)
def test_final_merge_keeps_the_function_and_no_wrapper(method, name, dtype):
    network = linear(adapted(name, method, dtype, train=[MODELS[name].head]))
    before, names = MODELS[name].run(network, dtype).detach(), [n for n, _ in la.adapters(network)]
    report = la.merge(network)
    after = MODELS[name].run(network, dtype)
    eps = torch.finfo(dtype).eps
    assert (after - before).abs().max() <= 30 * eps * before.abs().max()
    assert report.max_rel_error <= 4 * eps
    assert not list(la.adapters(network))
    left = [n for n, m in network.named_modules() if type(m).__module__.startswith("lit_adapters")]
    assert left == report.kept  # rational functions; nothing of ours remains of weight adapters
    assert sorted(report.merged + report.kept) == sorted(names)
    assert after.dtype == before.dtype


@cases(lambda method: method not in UNMERGEABLE)
def test_reversible_merge_is_undone_bit_for_bit(method, name, dtype):
    network = linear(adapted(name, method, dtype))
    state = copy.deepcopy(network.state_dict())
    before = MODELS[name].run(network, dtype)
    report = la.merge(network, unload=False)
    assert torch.allclose(MODELS[name].run(network, dtype), before, rtol=0, atol=30 * torch.finfo(dtype).eps)
    if not report.merged:
        with pytest.raises(la.AdapterError, match="nothing is merged"):
            la.unmerge(network)
    else:
        with pytest.raises(la.AdapterError, match="merged already"):
            la.merge(network)
        with pytest.raises(la.AdapterError, match="unmerge"), la.disabled(network):
            pass
        la.unmerge(network)
    assert not changed_tensors(state, network.state_dict())
    assert torch.equal(MODELS[name].run(network, dtype), before)


@pytest.mark.parametrize("unload", [True, False])
@pytest.mark.parametrize("method", UNMERGEABLE)
def test_a_refused_merge_leaves_the_model_as_before(method, unload):
    network = adapted("vit", method)
    state, before = copy.deepcopy(network.state_dict()), MODELS["vit"].run(network)
    with pytest.raises(la.AdapterError, match="no weight is equal to it"):
        la.merge(network, unload=unload)
    assert not changed_tensors(state, network.state_dict())
    assert torch.equal(MODELS["vit"].run(network), before)


@pytest.mark.parametrize("name", ["vit", "llama"])
@each_method
def test_detach_leaves_no_trace(method, name):
    network = build(name)
    next(network.parameters()).requires_grad_(False)
    modules = dict(network.named_modules(remove_duplicate=False))
    parameters = dict(network.named_parameters())
    required, values = {n: p.requires_grad for n, p in parameters.items()}, copy.deepcopy(network.state_dict())
    attributes = {n: set(vars(m)) for n, m in modules.items()}
    expected = MODELS[name].run(network)
    la.attach(network, ALL[method], train=[MODELS[name].head])
    la.detach(network)
    la.attach(network, ALL[method])
    move(network)
    assert not torch.equal(MODELS[name].run(network), expected)
    la.detach(network)
    after = dict(network.named_modules(remove_duplicate=False))
    assert after.keys() == modules.keys()
    assert all(after[n] is modules[n] for n in modules)
    assert all(dict(network.named_parameters())[n] is p for n, p in parameters.items())
    assert {n: p.requires_grad for n, p in network.named_parameters()} == required
    assert {n: set(vars(m)) for n, m in after.items()} == attributes
    assert not changed_tensors(values, network.state_dict())
    assert torch.equal(MODELS[name].run(network), expected)
    network.load_state_dict(values)
    with pytest.raises(RuntimeError, match="Missing"):
        network.load_state_dict({})


@pytest.mark.parametrize(
    ("duplicate", "name"),
    [(copy.deepcopy, "vit"), (lambda m: pickle.loads(pickle.dumps(m)), "llama")],
    ids=["copy", "pickle"],
)
@each_method
def test_a_copy_works_and_is_independent(duplicate, method, name):
    network = adapted(name, method, train=[MODELS[name].head])
    before = MODELS[name].run(network)
    twin = duplicate(network)
    assert torch.equal(MODELS[name].run(twin), before)
    twin.to(torch.bfloat16)
    MODELS[name].run(twin, torch.bfloat16)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not MODELS[name].run(twin, torch.bfloat16).any()  # its base layers read its own tables
    assert torch.equal(MODELS[name].run(network), before)
    la.detach(twin)
    assert torch.equal(MODELS[name].run(network), before)


@each_method
def test_same_seed_same_adapter(method):
    first, second = adapted("vit", method, seed=None), adapted("vit", method, seed=None)
    assert not changed_tensors(first.state_dict(), second.state_dict())
