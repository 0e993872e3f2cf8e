"""Group-wise rational functions R(x) = P(x) / Q(x) of the channels of a tensor.

    P(x) = a_0 + a_1 x + ... + a_m x^m
    Q(x) = 1 + | b_1 x + ... + b_n x^n |            "abs-of-sum"  (NoRA, arXiv 2509.13240; KAT, arXiv 2409.10594)
    Q(x) = 1 + |b_1||x| + ... + |b_n||x|^n          "sum-of-abs"  (Padé activation units, version A)

The D channels are split into G contiguous groups of equal size; group g has row g of `numerator` (G, m+1) and of
`denominator` (G, n). Both forms have Q >= 1, hence no poles. The sub-gradient of |z| at z = 0 is +1 in every path, so
that a coefficient that starts at exactly 0 can train.

`rational` takes one of four paths, which agree to rounding:

    formula    `_by_formula` below                 under the transforms of torch.func, in forward-mode and second
                                                   derivatives, and in what a tracer or an exporter records
    C++        _rational_native.py, rational.cpp   on the CPU, float32 and bfloat16, if a C++ compiler is there
    blocks     _rational_blocks.py                 everywhere else (PyTorch operations of _rational_math.py)
    Triton     _rational_triton.py                 on a GPU with triton; tested under the interpreter, not measured
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_adapters.ops import _rational_blocks, _rational_native
from lit_adapters.ops._context import has_sizes, transformed
from lit_adapters.ops._groups import as_groups, dense, grouped_shape
from lit_adapters.ops._native import in_memory
from lit_adapters.ops._rational_math import MAX_DEGREE, sign

Denominator = Literal["abs-of-sum", "sum-of-abs"]
__all__ = [
    "MAX_DEGREE",
    "Backend",
    "Denominator",
    "fixed_rational",
    "rational",
    "rational_reference",
    "set_rational_backend",
]

Backend = Literal["auto", "blocks", "triton"]

_Pair = tuple[Tensor, Tensor]  # numerator and denominator
_backend: Backend = "auto"


def set_rational_backend(backend: Backend) -> None:
    """Choose how rational functions are computed; the results agree to rounding.

    Args:
        backend: "blocks" runs plain PyTorch operations on cache-sized blocks and needs no compiler. "triton" runs
            kernels for GPUs, whose speed has not been measured on one yet. "auto" takes Triton on a GPU, a C++ kernel
            on the CPU (compiled at first use, about two seconds for each form and its degrees), and blocks if neither
            is available.

    Raises:
        ValueError: The name of the backend is unknown.
    """
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    _backend = backend


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _uses_triton(x: Tensor) -> bool:
    return _backend == "triton" or (_backend == "auto" and x.is_cuda and _has_triton())


def _magnitude(z: Tensor) -> Tensor:
    """|z| whose sub-gradient at 0 is +1."""
    return torch.where(z >= 0, z, -z)


def rational_reference(
    x: Tensor, numerator: Tensor, denominator: Tensor, form: Denominator = "abs-of-sum", channel_dim: int = -1
) -> Tensor:
    """R(x) by the formula, differentiated by autograd: the reference that `rational` is tested against.

    Saves a dozen tensors for backward and overflows where x^m does; call it in float64.

    Args:
        x: (..., D, ...) with D channels at `channel_dim`.
        numerator: The coefficients a_0..a_m of each group (G, m+1), in the dtype of x. G must divide D.
        denominator: The coefficients b_1..b_n of each group (G, n), in the dtype of x.
        form: Which Q; see the module's docstring.
        channel_dim: The dimension of `x` that holds the channels.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    x = x.movedim(channel_dim, -1)
    grouped = x.unflatten(-1, (numerator.shape[0], -1))
    a, b = numerator.unsqueeze(1), denominator.unsqueeze(1)  # (G, 1, degree)
    p = torch.stack([a[..., i] * grouped**i for i in range(a.shape[-1])]).sum(0)
    degrees = range(b.shape[-1])
    if form == "abs-of-sum":
        q = 1 + _magnitude(torch.stack([b[..., j] * grouped ** (j + 1) for j in degrees]).sum(0))
    else:
        q = 1 + torch.stack([_magnitude(b[..., j]) * _magnitude(grouped) ** (j + 1) for j in degrees]).sum(0)
    return (p / q).flatten(-2).movedim(-1, channel_dim)


def rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    form: Denominator = "abs-of-sum",
    channel_dim: int = -1,
    base: _Pair | None = None,
) -> Tensor:
    """R(x; numerator, denominator), or with `base` the difference R(x; numerator, denominator) - R(x; *base).

    Computes in float32 (float64 for float64 inputs), whatever the dtype of `x`, and saves only `x` for backward, which
    recomputes the rest. Blocks with |x| > 1e4, whose powers may overflow, are computed in float64. The
    sub-gradient of |z| at 0 is +1, so that coefficients at exactly 0 can train.

    Args:
        x: (..., D, ...) with D channels at `channel_dim`; any floating dtype.
        numerator: The coefficients a_0..a_m of each group (G, m+1), any floating dtype. G must divide D.
        denominator: The coefficients b_1..b_n of each group (G, n), any floating dtype.
        form: Which Q; see the module's docstring.
        channel_dim: The dimension of `x` that holds the channels.
        base: The coefficients of the subtracted function, of the same shapes. They are constants and receive no
            gradient. If they equal the other coefficients, the result is exactly 0.

    Returns:
        A tensor of the shape, dtype and memory order of `x`.

    Raises:
        ValueError: The groups do not divide the channels, or the shapes of the coefficients disagree.
    """
    if has_sizes():
        _check_sizes(x, numerator, denominator, channel_dim, base)
    if transformed():
        return _by_formula(x, (numerator, denominator), base, form, channel_dim)
    base_numerator, base_denominator = base if base is not None else (None, None)
    function = _evaluate if _is_plain_call(x, numerator, denominator) else _rational
    return function(x, numerator, denominator, form, channel_dim, base_numerator, base_denominator)


def fixed_rational(
    numerator: Tensor, denominator: Tensor, form: Denominator, channel_dim: int, base: _Pair | None
) -> Callable[[Tensor], Tensor]:
    """`rational` as a function of x alone, for coefficients that nobody writes to.

    Meant for generation: on one token, `rational` spends more time on looking up what stays the same than on
    arithmetic.

    Args:
        numerator: As for `rational`.
        denominator: As for `rational`.
        form: As for `rational`.
        channel_dim: As for `rational`.
        base: As for `rational`.

    Returns:
        A function of x (..., D, ...) that returns what `rational` returns.
    """
    prepared = _rational_native.Prepared((numerator, denominator), base, form)
    on_cpu = in_memory(numerator, denominator, *(base or ()))

    def evaluate(x: Tensor) -> Tensor:
        last = channel_dim == -1 or channel_dim == x.ndim - 1
        if on_cpu and last and _backend == "auto" and _is_plain_call(x) and x.is_cpu and x.is_contiguous():
            y = prepared(x)
            if y is not None:
                return y
        return rational(x, numerator, denominator, form, channel_dim, base)

    return evaluate


def _check_sizes(x: Tensor, numerator: Tensor, denominator: Tensor, channel_dim: int, base: _Pair | None) -> None:
    channels, groups = x.shape[channel_dim], numerator.shape[0]
    if channels % groups:
        raise ValueError(
            f"{groups} groups do not divide the {channels} channels of dimension {channel_dim} of an input of shape "
            f"{tuple(x.shape)}; choose groups among the divisors of {channels}, or another channel_dim"
        )
    if denominator.shape[0] != groups:
        raise ValueError(f"numerator has {groups} groups and denominator {denominator.shape[0]}; they must agree")
    if base is not None and (base[0].shape != numerator.shape or base[1].shape != denominator.shape):
        raise ValueError(
            f"base has shapes {tuple(base[0].shape)}, {tuple(base[1].shape)}; "
            f"expected {tuple(numerator.shape)}, {tuple(denominator.shape)}"
        )


def _by_formula(x: Tensor, coefficients: _Pair, base: _Pair | None, form: Denominator, channel_dim: int) -> Tensor:
    """`rational` in plain operators, differentiable any number of times.

    It does not overflow where R(x) does not, unless all b are 0; then float32 ends at |x| of about 1e9.

    With s = max(1, |x|), u = x / s and v = 1 / s,

        R(x) = s^(m-n) (a_0 v^m + a_1 u v^(m-1) + ... + a_m u^m) / (v^n + |b_1 u v^(n-1) + ... + b_n u^n|)

    and no power of u or v is larger than 1. R does not depend on s, which therefore counts as a constant in
    derivatives.
    """
    last, dim = x.dim() - 1, channel_dim % x.dim()  # the older ONNX exporter does not count from the end
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, last)
    grouped = wide.unflatten(-1, (coefficients[0].shape[0], -1))
    s = grouped.detach().abs().clamp(min=1)
    u, v = grouped / s, 1 / s

    def evaluate(numerator: Tensor, denominator: Tensor) -> Tensor:
        a, b = (c.to(wide.dtype).unsqueeze(-1).unbind(1) for c in (numerator, denominator))
        m, n = len(a) - 1, len(b)
        if form == "abs-of-sum":
            q = _magnitude(u * _homogeneous(b, u, v))
        else:
            q = _magnitude(u) * _homogeneous([_magnitude(column) for column in b], _magnitude(u), v)
        ratio = _homogeneous(a, u, v) / (v**n + q)
        return ratio * (s ** (m - n) if m >= n else v ** (n - m))

    y = evaluate(*coefficients)
    if base is not None:
        y = y - evaluate(base[0].detach(), base[1].detach())
    return y.flatten(-2).movedim(last, dim).to(x.dtype)


def _homogeneous(columns: Sequence[Tensor], u: Tensor, v: Tensor) -> Tensor:
    """c_0 v^k + c_1 u v^(k-1) + ... + c_k u^k by Horner's rule.

    Args:
        columns: The coefficients c_0..c_k, (G, 1) each.
        u: (..., G, K).
        v: (..., G, K).
    """
    *lower, total = columns
    power = v
    for column in reversed(lower):
        total = total * u + column * power
        power = power * v
    return total


def _is_plain_call(x: Tensor, *coefficients: Tensor) -> bool:
    """Whether nothing differentiates, traces or intercepts this call, so that `_evaluate` can be called directly.

    Dispatching the custom operator takes as long as computing one token.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, *coefficients)) and not x.is_meta


def _evaluate(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    form: str,
    channel_dim: int,
    base_numerator: Tensor | None,
    base_denominator: Tensor | None,
) -> Tensor:
    x, groups = dense(x, channel_dim), numerator.shape[0]
    y, shape = torch.empty_like(x), grouped_shape(x, groups, channel_dim)
    coefficients, base = (numerator, denominator), _pair(base_numerator, base_denominator)
    native = _backend == "auto" and _rational_native.can_run(x, shape)
    if native and _rational_native.forward(x, y, shape, coefficients, base, form):
        return y
    grouped, out = as_groups(x, groups, channel_dim), as_groups(y, groups, channel_dim)
    if _uses_triton(x):
        from lit_adapters.ops import _rational_triton  # imports triton, which is needed on a GPU only

        _rational_triton.forward(grouped, out, coefficients, base, form)
    else:
        _rational_blocks.forward(grouped, out, coefficients, base, form)
    return y


# An operator that torch.compile does not look into: a compiled model stays one graph, and the block loop is not traced.
_rational = torch.library.custom_op("lit_adapters::rational", _evaluate, mutates_args=())


@_rational.register_fake
def _(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, channel_dim: int, *base: Tensor | None) -> Tensor:
    return torch.empty_like(dense(x, channel_dim))


@torch.library.custom_op("lit_adapters::rational_backward", mutates_args=())
def _rational_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    form: str,
    channel_dim: int,
    base_numerator: Tensor | None,
    base_denominator: Tensor | None,
    need_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, groups = dense(x, channel_dim), numerator.shape[0]
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    grad_x, shape, sums = torch.empty_like(x), grouped_shape(x, groups, channel_dim), None
    coefficients, base = (numerator, denominator), _pair(base_numerator, base_denominator)
    if _backend == "auto" and _rational_native.can_run(x, shape):
        sums = _rational_native.backward(grad, x, grad_x, shape, coefficients, base, form, need_coefficients)
    if sums is None:
        view = functools.partial(as_groups, groups=groups, channel_dim=channel_dim)
        grouped = view(grad), view(x), view(grad_x)
        if _uses_triton(x):
            from lit_adapters.ops import _rational_triton

            sums = _rational_triton.backward(*grouped, coefficients, base, form, need_coefficients)
        else:
            sums = _rational_blocks.backward(*grouped, coefficients, base, form, need_coefficients)
    grad_a, grad_b = sums.split([numerator.shape[1], denominator.shape[1]], dim=1)
    if form == "sum-of-abs":
        grad_b = grad_b * sign(denominator)
    # Copied, as results of an operator may not share memory; contiguous, as `register_fake` below says.
    return (
        grad_x,
        numerator.new_empty(numerator.shape).copy_(grad_a),
        denominator.new_empty(denominator.shape).copy_(grad_b),
    )


@_rational_backward.register_fake
def _(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str, channel_dim: int, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    grads = numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)
    return torch.empty_like(dense(x, channel_dim)), *grads


def _pair(a: Tensor | None, b: Tensor | None) -> _Pair | None:
    return None if a is None or b is None else (a, b)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, numerator, denominator, ctx.form, ctx.channel_dim, base_numerator, base_denominator = inputs
    ctx.save_for_backward(x, numerator, denominator, base_numerator, base_denominator)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, numerator, denominator, *base = ctx.saved_tensors
    need_coefficients = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grads = _rational_backward(grad, x, numerator, denominator, ctx.form, ctx.channel_dim, *base, need_coefficients)
    wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None)


_rational.register_autograd(_backward, setup_context=_setup_context)


def _setup_second_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.form, ctx.channel_dim, base_numerator, base_denominator, ctx.need_coefficients = inputs
    ctx.save_for_backward(*tensors, base_numerator, base_denominator)


def _second_backward(ctx, *upstream):  # type: ignore[no-untyped-def]
    """The gradients of what `rational_backward` returns, by the formula, for second and higher derivatives."""
    *tensors, base_numerator, base_denominator = ctx.saved_tensors
    base, higher = _pair(base_numerator, base_denominator), torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as the first gradient itself depends on x: derivatives by the views stop at them.
        tensors = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        grad, x, numerator, denominator = tensors
        y = _by_formula(x, (numerator, denominator), base, ctx.form, ctx.channel_dim)
        sources = (x, numerator, denominator) if ctx.need_coefficients else (x,)
        first = torch.autograd.grad(y, sources, grad, create_graph=True)
        second = torch.autograd.grad(
            first, tensors, upstream[: len(first)], create_graph=higher, allow_unused=True, materialize_grads=True
        )
    wanted = (g if need else None for g, need in zip(second, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


_rational_backward.register_autograd(_second_backward, setup_context=_setup_second_context)
