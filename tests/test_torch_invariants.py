"""What PyTorch does to modules, for every method: state dicts, casts, checkpointing, compilation, meta device."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call

import lit_adapters as la
from tests.matrix import ALL, MODELS, adapted, build, changed_tensors, move

each_model = pytest.mark.parametrize("name", MODELS)
each_method = pytest.mark.parametrize("method", ALL)


def frozen_keys(network: nn.Module) -> set[str]:
    return {n for n, p in network.named_parameters() if not p.requires_grad}


# ---- state dicts


@pytest.mark.parametrize("method", ["lora", "nora"])
def test_safetensors_with_tied_weights(method, tmp_path):
    def tied():
        network = adapted("llama", method)
        network.get_output_embeddings().weight = network.get_input_embeddings().weight
        return network

    network, other = tied(), tied()
    move(network)
    safetensors.torch.save_model(network, str(tmp_path / "file"))
    safetensors.torch.load_model(other, str(tmp_path / "file"))
    assert not changed_tensors(network.state_dict(), other.state_dict())


@each_method
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_strict_loading_forgives_frozen_base_keys_and_nothing_else(method, name):
    network = adapted(name, method, train=[MODELS[name].head])
    state, frozen = copy.deepcopy(network.state_dict()), frozen_keys(network)
    kept = {k: v for k, v in state.items() if k not in frozen}
    assert 0 < len(kept) < len(state)
    other = adapted(name, method, train=[MODELS[name].head], seed=7)
    other.load_state_dict(kept)
    assert not changed_tensors(state, other.state_dict())

    for key in kept:
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            other.load_state_dict({k: v for k, v in kept.items() if k != key})
    with pytest.raises(RuntimeError, match="surprise"):
        other.load_state_dict(kept | {"surprise": torch.zeros(1)})
    wrong = next(iter(kept))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(kept | {wrong: torch.zeros(1, 2, 3)})


class Pair(nn.Module):
    """An adapted network beside others with the same key names."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.net = adapted("vit", method)
        self.net_twin = adapted("vit", method)
        self.plain = build("vit")


@each_method
def test_strict_loading_inside_another_module(method):
    pair = Pair(method)
    state, frozen = pair.state_dict(), frozen_keys(pair)
    assert any(k.startswith("net_twin.") for k in frozen)
    kept = {k: v for k, v in state.items() if k not in frozen}
    pair.load_state_dict(kept)
    plain = next(k for k in kept if k.startswith("plain."))
    for key in (plain, next(k for k in kept if k.startswith("net."))):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            pair.load_state_dict({k: v for k, v in kept.items() if k != key})
    # After a nested load the network is still loaded under its own names.
    pair.net.load_state_dict({k.removeprefix("net."): v for k, v in kept.items() if k.startswith("net.")})


@each_method
def test_loading_by_assignment_reaches_the_base_layers(method):
    network, other = adapted("vit", method), adapted("vit", method, seed=5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)
    assert torch.equal(MODELS["vit"].run(other), MODELS["vit"].run(network))
    assert frozen_keys(other) == frozen_keys(network)


@each_method
def test_parameters_may_be_replaced_from_outside(method):
    """As sharding and functional calls do."""
    network, source = adapted("vit", method), adapted("vit", method, seed=5)
    x = MODELS["vit"].inputs()
    expected = source(x)
    tensors = dict(source.named_parameters()) | dict(source.named_buffers())
    assert torch.equal(functional_call(network, tensors, (x,)), expected)
    before = network(x)
    for name, _ in list(network.named_parameters()):
        module, _, attribute = name.rpartition(".")
        value = source.get_parameter(name)
        replaced = nn.Parameter(value.detach().clone(), value.requires_grad)
        setattr(network.get_submodule(module), attribute, replaced)
    assert torch.equal(network(x), expected)
    assert not torch.equal(before, expected)


# ---- dtypes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in MODELS), ("vit", torch.float16), ("llama", torch.float64)],
    ids=str,
)
@each_method
def test_casts_keep_adapters_in_float32(dtype, method, name):
    network, base = adapted(name, method), build(name).to(dtype)
    before = {f"{n}.{k}": t.clone() for n, a in la.adapters(network) for k, t in a.adapter_tensors().items()}
    network = {torch.float16: network.half, torch.float64: network.double}.get(dtype, lambda: network.to(dtype))()
    after = {f"{n}.{k}": t for n, a in la.adapters(network) for k, t in a.adapter_tensors().items()}
    assert not changed_tensors(before, after)
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.float32}
    assert {n: p.dtype for n, p in network.named_parameters() if n not in after} == {
        n: p.dtype for n, p in base.named_parameters()
    }
    output = MODELS[name].run(network, dtype)
    assert output.dtype == dtype
    assert output.isfinite().all()
    with la.disabled(network):
        assert torch.equal(MODELS[name].run(network, dtype), MODELS[name].run(base, dtype))


@each_method
def test_casts_keep_gradients_of_adapters_in_float32(method):
    network = adapted("vit", method)
    MODELS["vit"].run(network).sum().backward()
    network.to(torch.bfloat16)
    assert {p.grad.dtype for _, a in la.adapters(network) for p in a.adapter_parameters().values()} == {torch.float32}


@each_model
@each_method
def test_autocast_gives_each_layer_the_dtype_of_its_base(method, name):
    network, seen = adapted(name, method), []
    for _, adapter in la.adapters(network):
        adapter.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = MODELS[name].run(network)
        assert output.dtype == MODELS[name].run(build(name)).dtype
        assert seen
        assert all(dtype == module.base(x).dtype for module, x, dtype in seen)
        output.float().sum().backward()
    assert {p.grad.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


# ---- running


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@each_method
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(method, name):
    plain = adapted(name, method).train()
    checkpointed = copy.deepcopy(plain)
    if name == "vit":
        checkpointed.set_grad_checkpointing()
    else:
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for network in (plain, checkpointed):
        MODELS[name].run(network).square().sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert all(g.any() for g in expected.values())
    assert not changed_tensors(expected, {n: p.grad for n, p in checkpointed.named_parameters() if p.requires_grad})


@each_method
def test_inference_mode_gives_the_same_output_and_leaves_training_alone(method):
    network = adapted("vit", method)
    expected = MODELS["vit"].run(network)
    with torch.inference_mode():
        assert torch.equal(MODELS["vit"].run(network), expected)
    MODELS["vit"].run(network).sum().backward()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


QUICK = {"lora", "nora", "group_affine", "loran"}  # a second or more each: the others are in the slow tier


@pytest.mark.parametrize(
    ("method", "make", "shape"),
    [
        *(pytest.param(m, mlp, (3, 6), id=m, marks=[] if m in QUICK else pytest.mark.slow) for m in ALL),
        pytest.param("nora++", lambda: build("vit"), (3, 3, 32, 32), id="nora++-vit", marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph_and_trains(method, make, shape):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, x = make(), torch.randn(shape)
    la.attach(network, ALL[method])
    trainable = [p for p in network.parameters() if p.requires_grad]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for progress in (0.0, 0.1, 1.0):
        move(network)  # neither a step nor annealing must compile again
        la.set_progress(network, progress)
        expected, actual = network(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), trainable) for y in (expected, actual)]
        # LoRAN's kernel takes the argument of a sine in float64, traced operations take it in float32.
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@each_method
def test_meta_device_then_empty_then_load(method):
    source = adapted("vit", method, train=["head"])
    with torch.device("meta"):
        network = MODELS["vit"].make()
    la.attach(network, ALL[method], train=["head"])
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    images = MODELS["vit"].inputs()
    assert network(images.to("meta")).shape == source(images).shape
    network.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(MODELS["vit"].run(network), MODELS["vit"].run(source))
    assert frozen_keys(network) == frozen_keys(source)


@each_method
def test_adapters_loaded_on_the_meta_device_wait_for_the_base(method, tmp_path):
    source = adapted("vit", method, train=["head"])
    la.save_adapters(source, tmp_path)
    with torch.device("meta"):
        network = MODELS["vit"].make()
    la.load_adapters(network, tmp_path)
    network.load_state_dict(source.state_dict(), assign=True)
    assert not [name for name, t in (*network.named_parameters(), *network.named_buffers()) if t.is_meta]
    assert torch.equal(MODELS["vit"].run(network), MODELS["vit"].run(source))


@each_method
def test_reset_parameters_gives_a_fresh_adapter(method):
    network, fresh = adapted("vit", method), adapted("vit", method, seed=None)
    with torch.no_grad():
        for _, adapter in la.adapters(network):
            for tensor in adapter.adapter_tensors().values():
                tensor.fill_(1)
    torch.manual_seed(0)
    for _, adapter in la.adapters(network):
        adapter.reset_parameters()
    x = MODELS["vit"].inputs()
    assert torch.equal(network(x), fresh(x))
    assert {k: t.shape for k, t in network.state_dict().items()} == {k: t.shape for k, t in fresh.state_dict().items()}
