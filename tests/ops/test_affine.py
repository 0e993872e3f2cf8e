"""The shift and gain of groups by the kernels of rational functions, against the formula in float64."""

import pytest
import torch

from lit_adapters.ops.affine import group_affine, group_affine_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(("shape", "channel_dim"), [((5, 7, 24), -1), ((5, 24, 7), 1), ((33, 24), 1)])
@pytest.mark.parametrize("groups", [3, 24])
def test_values_and_gradients_are_those_of_the_formula(dtype, tolerance, shape, channel_dim, groups):
    torch.manual_seed(0)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    gain, shift = 0.3 * torch.randn(groups), torch.randn(groups)

    def computed(function, kind):
        leaves = [t.clone().to(kind or t.dtype).requires_grad_() for t in (x, gain, shift)]
        y = function(*leaves, channel_dim)
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    found, expected = computed(group_affine, None), computed(group_affine_reference, torch.float64)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    for value, exact in zip(found, expected, strict=True):
        size = tolerance if value.dtype == dtype else 1e-5
        torch.testing.assert_close(value.double(), exact, rtol=size, atol=size * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_change_nothing(dtype):
    x = torch.cat([torch.randn(4, 8), 1e30 * torch.randn(1, 8), torch.zeros(1, 8)]).to(dtype)
    assert torch.equal(group_affine(x, torch.zeros(2), torch.zeros(2)), x)
