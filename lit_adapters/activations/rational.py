"""A group-wise rational activation as a plain module; merging a NoRA leaves one in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.ops import Denominator, fixed_rational, rational
from lit_adapters.ops._context import refuse_symbols, transformed, unscriptable
from lit_adapters.ops.cache import Cache


class RationalActivation(nn.Module):
    """y = R(x; numerator, denominator), or anchored y = act(x) + R(x; numerator, denominator) - R(x; *base).

    Args:
        numerator: The coefficients a_0..a_m (G, m+1), one row for each group of channels.
        denominator: The coefficients b_1..b_n (G, n).
        form: "abs-of-sum" or "sum-of-abs"; see `lit_adapters.ops.rational`.
        channel_dim: The dimension of the input that holds the channels.
        anchor: The fixed activation act; None for the plain rational function.
        base: The coefficients of the function that the anchored form subtracts, (G, m+1) and (G, n).

    Raises:
        ValueError: Only one of `anchor` and `base` is given.
    """

    base_numerator: Tensor | None
    base_denominator: Tensor | None

    def __init__(
        self,
        numerator: Tensor,
        denominator: Tensor,
        form: Denominator = "abs-of-sum",
        channel_dim: int = -1,
        anchor: nn.Module | None = None,
        base: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if (anchor is None) != (base is None):
            raise ValueError("an anchored activation needs both `anchor` and `base`, a plain one neither")
        self.numerator = nn.Parameter(numerator.detach().clone())
        self.denominator = nn.Parameter(denominator.detach().clone())
        self.form, self.channel_dim, self.anchor = form, channel_dim, anchor
        self.register_buffer("base_numerator", None if base is None else base[0].detach().clone())
        self.register_buffer("base_denominator", None if base is None else base[1].detach().clone())
        self._function: Cache[Callable[[Tensor], Tensor]] = Cache()

    def forward(self, x: Tensor) -> Tensor:
        refuse_symbols(type(self).__name__)
        change = self._evaluate(x)
        if self.anchor is None:
            return change
        y: Tensor = self.anchor(x)
        return y + change.to(y.dtype)

    def _evaluate(self, x: Tensor) -> Tensor:
        """R(x) minus R(x; *base).

        While nothing trains, the function is prepared once and kept.
        """
        trained = torch.is_grad_enabled() or any(p.requires_grad for p in self._parameters.values() if p is not None)
        if trained or torch.compiler.is_compiling() or transformed():
            a, b, base = self._coefficients()
            return rational(x, a, b, self.form, self.channel_dim, base)
        sources = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        return self._function.get(sources, self._fixed)(x)

    def _fixed(self) -> Callable[[Tensor], Tensor]:
        # Cloned, as sharding frees the memory of a parameter.
        a, b, base = self._coefficients()
        base = None if base is None else (base[0].clone(), base[1].clone())
        return fixed_rational(a.clone(), b.clone(), self.form, self.channel_dim, base)

    def _coefficients(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        base = None
        if self.base_numerator is not None and self.base_denominator is not None:
            base = self.base_numerator.float(), self.base_denominator.float()
        return self.numerator.float(), self.denominator.float(), base

    def __prepare_scriptable__(self) -> RationalActivation:
        """Called by torch.jit.script, which would fail at the first annotation.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(unscriptable(type(self).__name__))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._function.clear()  # moving a parameter does not count as a write to it
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        groups, degrees = self.numerator.shape[0], (self.numerator.shape[1] - 1, self.denominator.shape[1])
        return f"groups={groups}, degrees={degrees}, form={self.form}, channel_dim={self.channel_dim}"
