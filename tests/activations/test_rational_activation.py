"""A rational activation as a plain module: frozen, its function is prepared once, and again after a change."""

import copy
import pickle

import pytest
import torch

import lit_adapters as la
from lit_adapters.ops import rational
from tests.ops.test_rational import coefficients


def frozen(anchored):
    a, b = coefficients(4)
    anchor = torch.nn.SiLU() if anchored else None
    base = coefficients(4) if anchored else None
    return la.RationalActivation(a, b, anchor=anchor, base=base).requires_grad_(False)


def formula(activation, x):
    anchored = activation.anchor is not None
    base = (activation.base_numerator.float(), activation.base_denominator.float()) if anchored else None
    y = rational(x, activation.numerator.float(), activation.denominator.float(), base=base)
    return activation.anchor(x) + y.to(x.dtype) if anchored else y


CHANGES = {
    "nothing": lambda m: m,
    "written to": lambda m: m.numerator.mul_(2) is None or m,
    "another tensor": lambda m: setattr(m, "denominator", torch.nn.Parameter(m.denominator * 2, False)) or m,
    "loaded": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}) and m,
    "cast": lambda m: m.to(torch.bfloat16),
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("change", list(CHANGES))
def test_in_use_it_follows_its_coefficients(change, anchored):
    activation, x = frozen(anchored), torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(activation(x), formula(activation, x))
        activation = CHANGES[change](activation)
        assert torch.equal(activation(x), formula(activation, x))


def test_in_use_nothing_is_formed_twice(monkeypatch):
    activation, x, formed = frozen(False), torch.randn(3, 96), []
    original = activation._fixed
    monkeypatch.setattr(activation, "_fixed", lambda: formed.append(1) or original())
    for _ in range(3):
        with torch.no_grad():
            activation(x)
    assert len(formed) == 1


def test_trained_coefficients_get_gradients_and_are_never_kept():
    activation, x = frozen(False).requires_grad_(True), torch.randn(3, 96)
    activation(x).sum().backward()
    assert activation.numerator.grad.any()
    with torch.no_grad():
        activation(x)
        activation.numerator.data.mul_(2)  # as sharding writes, uncounted
        assert torch.equal(activation(x), formula(activation, x))
