"""Weights that are not there all the time: meta devices and offloading."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lit_adapters as la
from tests.matrix import METHODS, MODELS

LLAMA = MODELS["llama"]
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
PLACES |= {"lm_head": "cpu"}


def cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def cpu_with_buffers(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device="cpu")


def whole_blocks(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaMLP", "LlamaAttention"])


def one_layer(model, folder):
    places = PLACES | {"model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


OFFLOADING = [cpu, cpu_with_buffers, disk, whole_blocks, one_layer]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return LLAMA.make().eval()


@pytest.mark.parametrize("offload", OFFLOADING)
def test_an_offloaded_model_is_refused_and_stays_as_it_was(base, offload, tmp_path):
    model = copy.deepcopy(base)
    offload(model, tmp_path)
    for method in METHODS.values():
        with pytest.raises(la.AdapterError, match=r"accelerate offloads [0-9]+ modules of LlamaForCausalLM.*quantise"):
            la.attach(model, method)
    assert_close(LLAMA.run(model), LLAMA.run(base), rtol=0, atol=0)


CASES = [("lora", offload) for offload in (cpu_with_buffers, disk, whole_blocks)]
CASES += [("dora", one_layer), ("loran", one_layer), ("vera", cpu), ("bitfit", cpu)]


@pytest.mark.parametrize(("method", "offload"), CASES)
def test_a_model_offloaded_later_runs_and_nothing_reads_what_is_not_there(base, offload, method, tmp_path):
    model = copy.deepcopy(base)
    la.attach(model, METHODS[method])
    offload(model, tmp_path / "weights")
    assert_close(LLAMA.run(model), LLAMA.run(base))
    for act in (la.merge, la.detach, lambda m: la.save_adapters(m, tmp_path / "adapters")):
        with pytest.raises(la.AdapterError, match=r"the values of '.*' *, and .*(meta device|offloads them)"):
            act(model)
    assert not (tmp_path / "adapters").exists()
    assert_close(LLAMA.run(model), LLAMA.run(base))


def test_a_model_offloaded_later_is_not_measured(base, tmp_path):
    model = copy.deepcopy(base)
    la.attach(model, [la.NoRA(groups=4), la.LoRA(rank=2)])
    cpu(model, tmp_path)
    with pytest.raises(la.AdapterError, match="calibrating needs the values"):
        la.calibrate(model, [LLAMA.inputs()])
    with pytest.raises(
        la.AdapterError, match=r"merging needs the values of 'model.layers\.0.*accelerate offloads them"
    ):
        la.merge(model)


@pytest.mark.parametrize("method", ["lora", "loran", "nora++", "bitfit"])
def test_hooks_that_only_move_inputs_change_nothing(base, method):
    model = copy.deepcopy(base)
    accelerate.dispatch_model(model, PLACES | {"model.layers.1": "cpu"}, main_device="cpu", force_hooks=True)
    la.attach(model, METHODS[method])
    other = copy.deepcopy(base)
    la.attach(other, METHODS[method])
    other.load_state_dict(model.state_dict())
    assert_close(LLAMA.run(model), LLAMA.run(other), rtol=1e-5, atol=1e-6)
    la.detach(model)
    assert_close(LLAMA.run(model), LLAMA.run(base), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "vera"])
def test_an_adapter_is_not_put_where_weights_are_missing_and_others_are_loaded(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, device="meta"))
    with pytest.raises(la.AdapterError, match="the weights of '2' are on the meta device, and others of Sequential"):
        la.attach(model, METHODS[method])
    assert type(model[0]) is nn.Linear
    la.attach(model, la.LoRA(rank=2, targets=["0"]))


@pytest.mark.parametrize("method", METHODS)
def test_data_for_a_model_that_was_never_loaded(method):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    la.attach(model, METHODS[method])
    assert model(torch.empty(2, 8, device="meta")).is_meta
    with pytest.raises(
        la.AdapterError, match=r"a forward needs the values of '[01]', and these are on the meta device"
    ):
        model(torch.zeros(2, 8))
    with pytest.raises(la.AdapterError, match="on the meta device"):
        la.merge(model)
    model.to_empty(device="cpu")
    for _, adapter in la.adapters(model):  # the base first: some adapters start from its weight
        if isinstance(adapter.base, nn.Linear):
            nn.Linear.reset_parameters(adapter.base)
        adapter.reset_parameters()
    for module in (m for m in model.modules() if not isinstance(m, la.AdapterModule)):
        getattr(module, "reset_parameters", lambda: None)()
    assert torch.isfinite(model(torch.zeros(2, 8))).all()
    assert not any(module._forward_pre_hooks for module in model.modules())  # they looked once
