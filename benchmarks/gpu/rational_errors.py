"""Are the Triton kernels of the rational function right? Against the formula in float64, on the device.

The error of y and of the gradient of x is the largest one over the largest value. Its limit is the rounding of the
dtype and 1e-6; where two functions are subtracted (`anchored`), 1e-6 of the largest values of both. The error of a
coefficient's gradient is over the sum of the absolute terms, as sums lose what cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.setting import Record, Setting, attempt
from lit_adapters.activations import fit_for
from lit_adapters.methods.activation_adapter import ASSUMED_STD
from lit_adapters.ops import Denominator, rational, rational_reference, set_rational_backend

FORMS: tuple[Denominator, ...] = ("abs-of-sum", "sum-of-abs")
FLOAT32 = 1e-6
COEFFICIENTS = 5e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
HUGE = (3e8, -1e30)  # their powers overflow float32

Pair = tuple[Tensor, Tensor]


def errors(setting: Setting) -> Iterator[Record]:
    """One record for each form, dtype and shape, anchored or not; then inputs whose powers overflow."""
    set_rational_backend("triton")
    tokens, image = setting.choose(((8, 197, 3072), (8, 96, 56, 56)), ((2, 3, 48), (2, 8, 3, 3)))
    shapes = {"8 groups": (tokens, 8, -1), "24 channels": (tokens, tokens[-1] // 24, -1), "NCHW": (image, 8, 1)}
    for form in FORMS:
        for (case, shape), dtype, anchored in itertools.product(shapes.items(), ROUNDING, (False, True)):
            key = {"form": form, "case": case, "dtype": str(dtype).removeprefix("torch."), "anchored": anchored}
            yield attempt(key, partial(compare, setting, form, *shape, dtype, anchored))
        key = {"form": form, "case": "huge", "dtype": "float32", "anchored": False}
        yield attempt(key, partial(huge, setting, form))


def compare(
    setting: Setting,
    form: Denominator,
    shape: tuple[int, ...],
    groups: int,
    channel_dim: int,
    dtype: torch.dtype,
    anchored: bool,
) -> Record:
    """Errors of forward and backward, their limits, and whether a second run gives the same bits."""
    torch.manual_seed(0)
    # Wider inputs would find polynomials that cancel to a hundredth of their terms, as the coefficients are drawn.
    x, grad = ((scale * torch.randn(shape)).to(setting.device, dtype) for scale in (ASSUMED_STD, 1))
    start = coefficients(form, groups, setting.device)
    learned = tuple(c + 0.1 * torch.randn_like(c) * c.abs() for c in start)
    base = start if anchored else None
    got, again = (run(x, learned, grad, form, channel_dim, base) for _ in range(2))
    whole = reference(x, learned, grad, form, channel_dim)
    less = reference(x, start, grad, form, channel_dim)[:2] if anchored else [torch.zeros_like(w) for w in whole[:2]]
    terms = absolute_terms(x.movedim(channel_dim, -1), learned, grad.movedim(channel_dim, -1), form)
    # Triton's interpreter, which stands in for a GPU on a processor, cuts bfloat16 off in place of rounding.
    rounding = ROUNDING[dtype] * (2 if setting.device == "cpu" and dtype == torch.bfloat16 else 1)
    found: Record = {}
    for name, g, w, s in zip(("y", "dx"), got[:2], whole[:2], less, strict=True):
        largest = (w - s).abs().max()
        found[name] = ((g.double() - (w - s)).abs().max() / largest).item()
        found[f"{name}_limit"] = rounding + FLOAT32 * ((w.abs().max() + s.abs().max()) / largest).item()
    found["coefficients"] = max(
        ((g.double() - e).abs() / t.clamp_min(1e-30)).max().item()
        for g, e, t in zip(got[2:], whole[2:], terms, strict=True)
    )
    found["coefficients_limit"] = COEFFICIENTS
    right = all(found[name] <= found[f"{name}_limit"] for name in ("y", "dx", "coefficients"))
    zero_at_start = not anchored or not rational(x, *start, form, channel_dim, base=start).any().item()
    repeats = all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    return {**found, "zero_at_start": zero_at_start, "repeats": repeats, "right": right and zero_at_start and repeats}


def huge(setting: Setting, form: Denominator) -> Record:
    """Errors where some inputs are so large that a tile is computed in float64; each over 1 + its own value."""
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 16, device=setting.device) for _ in range(2))
    x[0, 0], x[1, 9] = HUGE
    learned = coefficients(form, 2, setting.device)
    got, expected = run(x, learned, grad, form, -1, None), reference(x, learned, grad, form, -1)
    y, dx = (((g - e).abs() / (1 + e.abs())).max().item() for g, e in zip(got[:2], expected[:2], strict=True))
    return {"y": y, "y_limit": FLOAT32, "dx": dx, "dx_limit": FLOAT32, "right": max(y, dx) <= FLOAT32}


def coefficients(form: Denominator, groups: int, device: str) -> Pair:
    """The fit of GELU, a little different in each group."""
    fit = fit_for(torch.nn.GELU(), (-6.0, 6.0), (5, 4), form)
    rows = (torch.tensor(c).repeat(groups, 1) for c in (fit.numerator, fit.denominator))
    a, b = ((c * (1 + 0.1 * torch.randn_like(c)) + 1e-3 * torch.randn_like(c)).float().to(device) for c in rows)
    return a, b


def run(x: Tensor, pair: Pair, grad: Tensor, form: Denominator, dim: int, base: Pair | None) -> list[Tensor]:
    """y, and the gradients of x, numerator and denominator, by the kernels."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *pair)]
    y = rational(*leaves, form, dim, base=base)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def reference(x: Tensor, pair: Pair, grad: Tensor, form: Denominator, dim: int) -> list[Tensor]:
    """y and the gradients without a base, by the formula in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *pair)]
    y = rational_reference(*leaves, form, dim)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def absolute_terms(x: Tensor, pair: Pair, grad: Tensor, form: Denominator) -> Pair:
    """Sums of |grad| |dR/dcoefficient| over the elements of each group, channels last: (G, m+1) and (G, n)."""
    a, b = (c.double() for c in pair)
    x, grad = x.double(), grad.double().abs()
    one = torch.zeros_like(a)
    one[:, 0] = 1
    reciprocal = rational_reference(x, one, b, form)
    value = rational_reference(x, a, b, form).abs()

    def sums(t: Tensor) -> Tensor:
        return t.unflatten(-1, (a.shape[0], -1)).movedim(-2, 0).flatten(1).sum(1)

    of_a = [sums(grad * reciprocal * x.abs() ** i) for i in range(a.shape[1])]
    of_b = [sums(grad * reciprocal * value * x.abs() ** (j + 1)) for j in range(b.shape[1])]
    return torch.stack(of_a, 1), torch.stack(of_b, 1)
