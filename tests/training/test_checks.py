"""Participation and finiteness, checked in a plain training loop."""

import pytest
import torch

import lit_adapters as la
from lit_adapters.training.nonfinite import locate_nonfinite, nonfinite_gradient, nonfinite_values
from lit_adapters.training.participation import ParticipationCheck
from lit_adapters.training.processes import gather_objects, is_first_process, raise_together
from tests.lightning.tiny_task import Net, both


def adapted():
    net = Net()
    la.attach(net, both(), train=["head"])
    return net


def batch():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_all_that_runs_takes_part():
    net = adapted()
    check = ParticipationCheck(net)
    assert check.watching
    net(batch()).sum().backward()
    assert check.after_forward() is None
    assert not check.watching
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    check.before_step(optimizer, [optimizer])


def test_what_does_not_run_is_named_and_no_hook_stays():
    net = adapted()
    check = ParticipationCheck(net)
    net.head(net.norm(net.blocks[0](batch())))
    assert check.after_forward().startswith("3 of 6 adapters did not run: blocks.1.fc1, blocks.1.act, blocks.1.fc2.")
    assert not any(adapter._forward_pre_hooks for _, adapter in la.adapters(net))


def test_a_parameter_without_gradient_is_named():
    net = adapted()
    check = ParticipationCheck(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(la.AdapterError, match="trains but received no gradient"):
        check.before_step(optimizer, [optimizer])
    allowed = ParticipationCheck(net, allow_unused=[".*"])
    allowed.before_step(optimizer, [optimizer])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("parameter", "the parameter 'head.bias' is no longer finite"),
        ("layer", "it came up in layer 'blocks.1.fc2'"),
        ("batch", "the batch itself holds values that are not finite"),
        ("nowhere", "every layer's output is finite, so it came up in the loss"),
    ],
)
def test_where_a_value_stopped_being_finite(where, words):
    net, x = adapted().eval(), batch()
    with torch.no_grad():
        if where == "parameter":
            net.head.bias[0] = float("nan")
        elif where == "layer":
            net.blocks[1].fc2.weight.fill_(3e38)
        elif where == "batch":
            x[0, 0] = float("inf")
    assert locate_nonfinite(net, x, net) == words
    assert not any(module._forward_hooks for module in net.modules())


def test_the_search_survives_an_error():
    assert "so it came up in the loss" in locate_nonfinite(adapted(), batch(), lambda x: 1 / 0)


def test_gradients_and_values_that_are_not_finite_are_named():
    net = adapted().eval()
    net(batch()).sum().backward()
    assert nonfinite_gradient(net) is None
    assert nonfinite_values(net) == []
    net.blocks[0].fc1.lora_B.grad[0, 0] = float("inf")
    net.norm.running_var[0] = float("nan")
    assert nonfinite_gradient(net) == "blocks.0.fc1.lora_B"
    assert nonfinite_values(net) == ["norm.running_var"]


def test_one_process_agrees_with_itself():
    assert gather_objects("value") == ["value"]
    assert is_first_process()
    raise_together(None)
    with pytest.raises(la.AdapterError, match="the reason"):
        raise_together("the reason")
