"""What we use of torch without its promise still means what we take it for; the message names our file.

tests/lightning/resume/test_private_interfaces.py asks whether the names of torch and Lightning exist.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
CACHE = "lit_adapters/ops/cache.py"
TRANSFORMS = "lit_adapters/ops/_context.py"
NATIVE = "lit_adapters/ops/_native.py"


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_are_counted():
    count = torch._C._len_torch_dispatch_stack
    with Passing():
        inside = count()
    assert (count(), inside) == (0, 1), (
        f"torch._C._len_torch_dispatch_stack does not count modes; {CACHE} and lit_adapters/ops/rational.py ask"
    )


def test_a_transform_of_torch_func_is_on_the_interpreter_stack():
    peek, seen = torch._C._functorch.peek_interpreter_stack, []
    torch.func.vmap(lambda x: (seen.append(peek()), x)[1])(torch.zeros(2))
    assert peek() is None, f"peek_interpreter_stack reports a transform where there is none; {TRANSFORMS} asks it"
    assert seen[0] is not None, f"peek_interpreter_stack does not report vmap; {TRANSFORMS} asks it"


def test_forward_mode_has_a_level():
    outside = forward_ad._current_level
    with forward_ad.dual_level():
        inside = forward_ad._current_level
    assert outside < 0 <= inside, f"forward_ad._current_level does not tell of forward mode; {TRANSFORMS} reads it"


def test_a_batch_of_vmap_has_no_storage():
    seen = []
    torch.func.vmap(lambda x: (seen.append(torch._C._has_storage(x)), x)[1])(torch.zeros(2, 3))
    assert torch._C._has_storage(torch.zeros(2)), f"_has_storage denies a plain tensor; {NATIVE} asks it"
    assert seen == [False], f"_has_storage says that a batch of vmap has memory; {NATIVE} would hand it to C++"


def test_a_write_raises_the_version():
    weight = nn.Parameter(torch.zeros(2))
    versions = [weight._version]
    with torch.no_grad():
        weight.add_(1)
    versions.append(weight._version)
    torch.autograd.graph.increment_version([weight])
    versions.append(weight._version)
    assert versions[0] < versions[1] < versions[2], (
        f"_version does not count writes to a tensor; {CACHE} and lit_adapters/methods/afa.py compare it"
    )


def test_torch_fx_replaces_the_call_of_modules_while_it_traces():
    plain, seen = nn.Module.__call__, []

    class Asking(nn.Module):
        def forward(self, x):
            seen.append(nn.Module.__call__ is not plain)
            return x

    torch.fx.symbolic_trace(Asking())
    proxy_tensor.make_fx(Asking())(torch.zeros(2))
    assert seen == [True, True], f"torch.fx leaves nn.Module.__call__ alone; {TRANSFORMS} tells it by that"
    assert nn.Module.__call__ is plain


# The private names of a module of torch.nn, and our file that uses each.
OF_A_MODULE = {
    "_parameters": "lit_adapters/methods/adapter_module.py",
    "_buffers": "lit_adapters/methods/adapter_module.py",
    "_modules": "lit_adapters/methods/peft_adapter.py",
    "_non_persistent_buffers_set": "lit_adapters/methods/adapter_module.py",
    "_apply": "lit_adapters/methods/adapter_module.py",
    "_load_from_state_dict": "lit_adapters/methods/adapter_module.py",
    "_save_to_state_dict": "lit_adapters/methods/adapter_module.py",
    "_forward_hooks": "lit_adapters/methods/low_rank.py",
    "_forward_pre_hooks": "lit_adapters/methods/low_rank.py",
    "_forward_pre_hooks_with_kwargs": "lit_adapters/model/meta.py",
    "_backward_hooks": "lit_adapters/methods/low_rank.py",
    "_backward_pre_hooks": "lit_adapters/methods/low_rank.py",
    "_load_state_dict_pre_hooks": "lit_adapters/model/record.py",
    "_load_state_dict_post_hooks": "lit_adapters/model/record.py",
    "_conv_forward": "lit_adapters/methods/matrix_layers.py",
}
OF_TORCH_NN = {
    "_ConvNd": (nn.modules.conv, "lit_adapters/methods/channels.py"),
    "_NormBase": (nn.modules.batchnorm, "lit_adapters/methods/channels.py"),
    "NonDynamicallyQuantizableLinear": (nn.modules.linear, "lit_adapters/methods/matrix_layers.py"),
}


def attributes(path):
    return {node.attr for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", OF_A_MODULE)
def test_a_module_has(name):
    assert hasattr(nn.Conv2d(1, 1, 1), name), f"torch's modules have no {name} any more; {OF_A_MODULE[name]} uses it"
    assert name in attributes(OF_A_MODULE[name]), f"{OF_A_MODULE[name]} does not use {name}: name the file that does"


@pytest.mark.parametrize("name", OF_TORCH_NN)
def test_torch_nn_has(name):
    module, path = OF_TORCH_NN[name]
    assert hasattr(module, name), f"{module.__name__} has no {name} any more; {path} uses it"
    assert name in attributes(path), f"{path} does not use {name}: name the file that does"


def test_the_list_is_whole():
    """Every private name of a base layer or a model that these rooms read stands in the lists."""
    ours = {"_adapter_parameters", "_recomputed_buffers", "_base_parameters"}
    used = set()
    for room in ("ops", "activations", "methods", "model"):
        for path in (ROOT / "lit_adapters" / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
                if owner in ("base", "module", "model", "parent", "weight", "self.base"):
                    used.add(node.attr)
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private - ours <= OF_A_MODULE.keys()


def test_our_hooks_are_found_among_those_of_a_module():
    """`detach` takes its own hooks for state dicts away again."""

    def hook(*args):
        return None

    model = nn.Linear(1, 1)
    model.register_load_state_dict_pre_hook(hook)
    model.register_load_state_dict_post_hook(hook)
    for name in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        (held,) = getattr(model, name).values()
        assert getattr(held, "hook", held) is hook, f"{name} holds no hook as given; lit_adapters/model/record.py asks"
