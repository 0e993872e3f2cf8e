"""Adapters that take no part in a training are noticed in any loop."""

import copy
import gc
import pickle
import warnings

import peft
import pytest
import torch
import torchvision
from torch import nn

import lit_adapters as la
from tests.matrix import MODELS, build

X = torch.linspace(-1, 1, 16).view(2, 8)


def steps(model, run, count=3, optimizer=None, parameters=None):
    """The warnings of a plain training loop."""
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=1e-3)
    gc.collect()  # models of earlier tests are watched as long as they live
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.zero_grad()
            run().square().sum().backward()
            optimizer.step()
    return [str(w.message) for w in caught if "take no part" in str(w.message)]


@pytest.mark.parametrize("method", [la.NoRA(groups=4), la.LoRA(rank=2, targets=["down_proj"])])
def test_what_get_peft_model_freezes(method):
    model = build("llama")
    la.attach(model, method)
    other = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tokens = MODELS["llama"].inputs()
    (message,) = steps(other, lambda: other(input_ids=tokens).logits)
    assert "2 of 2 adapters of LlamaForCausalLM" in message
    assert "'model.layers.0.mlp." in message
    assert "do not require a gradient (get_peft_model" in message


def test_weights_that_torchvision_reads_without_calling_the_layer():
    network = torchvision.models.swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3)
    la.attach(network, la.LoRA(rank=2), train=["head"])
    images = torch.randn(2, 3, 32, 32)
    (message,) = steps(network, lambda: network(images), count=1)
    assert "4 of 9 adapters" in message
    assert "'features.1.0.attn.qkv', 'features.1.0.attn.proj'" in message
    assert "received no gradient (the model reads these weights" in message


def test_an_mlp_that_another_library_fused():
    model = build("llama")
    la.attach(model, la.NoRA(groups=4), train=["norm"])
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, m=mlp: m.down_proj(nn.functional.silu(m.gate_proj(x)) * m.up_proj(x))
    (message,) = steps(model, lambda: MODELS["llama"].run(model), count=1)
    assert "2 of 2 adapters of LlamaForCausalLM" in message
    assert "'model.layers.0.mlp.act_fn', 'model.layers.1.mlp.act_fn' received no gradient" in message


@pytest.mark.parametrize("collected", [True, False])
def test_modules_that_were_put_in_the_place_of_adapters(collected):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    kept = None if collected else model[2]
    model[2] = nn.Linear(8, 8)
    gc.collect()
    (message,) = steps(model, lambda: model(X))
    assert "1 of 2 adapters of Sequential take no part in this training: '2' are in the model no longer" in message
    del kept


class Experts(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.used = used

    def forward(self, x):
        for i in self.used.pop(0):
            x = self.experts[i](x)
        return x


@pytest.mark.parametrize(
    ("used", "idle"), [([[0], [1, 2], [0]], None), ([[0], [0, 2], [0]], "'experts.1'"), ([[0, 1, 2], [0], [0]], None)]
)
def test_an_expert_has_two_steps_to_get_its_first_token(used, idle):
    model = Experts(used)
    la.attach(model, la.LoRA(rank=2))
    messages = steps(model, lambda: model(X))
    assert len(messages) == bool(idle)
    assert not idle or f"1 of 3 adapters of Experts take no part in this training: {idle} received" in messages[0]


@pytest.mark.parametrize("change", [lambda m: m, copy.deepcopy, torch.compiler.disable, nn.DataParallel])
def test_nothing_is_said_of_what_trains(change):
    model = build("vit")
    la.attach(model, [la.NoRA(groups=4), la.LoRA(rank=2)], train=["head"])
    model = change(model)
    assert steps(model, lambda: MODELS["vit"].run(model)) == []


def test_nothing_is_said_of_steps_that_do_not_train_it():
    model, other = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)
    la.attach(model, la.LoRA(rank=2))
    assert steps(other, lambda: other(model(X))) == []  # another optimiser
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()  # before there is a gradient, as for a learning rate scheduler
    with torch.no_grad():
        model(X)
    assert steps(model, lambda: model(X), optimizer=optimizer) == []


def test_a_closure_and_two_optimisers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    pairs = [list(a.adapter_parameters().values()) for _, a in la.adapters(model)]
    optimizers = [torch.optim.LBFGS(pair, max_iter=2) for pair in pairs]

    def closure():
        model.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step(closure)


def test_it_says_so_once_and_leaves_nothing_behind():
    from lit_adapters.model.watch import _watched

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    assert model in _watched
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert pickle.loads(pickle.dumps(model)) not in _watched
    model[2].requires_grad_(False)
    assert len(steps(model, lambda: model(X))) == 1
    assert model not in _watched
    la.detach(model)
    la.attach(model, la.LoRA(rank=2))
    la.detach(model)
    assert model not in _watched


def test_weights_that_are_offloaded_after_attach():
    import accelerate

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    accelerate.cpu_offload(model, execution_device="cpu")
    (message,) = steps(model, lambda: model(X), parameters=parameters)
    assert "2 of 2 adapters" in message
    assert "accelerate offloads" in message


@pytest.mark.parametrize("method", [la.LoRA(rank=2), la.NoRA(groups=4)])
def test_an_optimiser_that_was_made_before_attach(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    la.attach(model, method)
    (message,) = steps(model, lambda: model(X), optimizer=optimizer)
    assert "have gradients but are in no optimiser that has stepped" in message


def test_one_optimiser_for_each_parameter():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    optimizers = [torch.optim.SGD([p], lr=1e-3) for p in model.parameters() if p.requires_grad]

    class Each:
        zero_grad = staticmethod(lambda: [o.zero_grad() for o in optimizers])
        step = staticmethod(lambda: [o.step() for o in optimizers])

    assert steps(model, lambda: model(X), optimizer=Each) == []


def test_attach_on_a_model_of_peft():
    model = build("llama")
    other = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"attach freezes 4 parameters of peft's adapters.*name them in `train`"):
        la.attach(other, la.LoRA(rank=2))
    names = [name for name, _ in la.adapters(other)]
    assert not [name for name in names if "lora_" in name]
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in names
    la.detach(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.attach(other, la.LoRA(rank=2), train=r".*\.lora_[AB]\..*")
