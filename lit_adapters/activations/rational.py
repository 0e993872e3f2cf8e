"""A group-wise rational activation as a plain module: what a merged NoRA leaves behind."""

from __future__ import annotations

from torch import Tensor, nn

from lit_adapters.ops import Denominator, rational


class RationalActivation(nn.Module):
    """y = R(x; numerator, denominator), or anchored y = act(x) + R(x; numerator, denominator) - R(x; *base).

    Args:
        numerator: (G, m+1) coefficients a_0..a_m, one row for each group of channels.
        denominator: (G, n) coefficients b_1..b_n.
        form: "abs-of-sum" or "sum-of-abs"; see `lit_adapters.ops.rational`.
        channel_dim: dimension of the input that holds the channels.
        anchor: the fixed activation act; None for the plain rational function.
        base: coefficients of the function subtracted from the anchored form, ((G, m+1), (G, n)).
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

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.numerator.float(), self.denominator.float()
        if self.anchor is None or self.base_numerator is None or self.base_denominator is None:
            return rational(x, *coefficients, self.form, self.channel_dim)
        base = self.base_numerator.float(), self.base_denominator.float()
        change = rational(x, *coefficients, self.form, self.channel_dim, base=base)
        y: Tensor = self.anchor(x)
        return y + change.to(y.dtype)

    def extra_repr(self) -> str:
        groups, degrees = self.numerator.shape[0], (self.numerator.shape[1] - 1, self.denominator.shape[1])
        return f"groups={groups}, degrees={degrees}, form={self.form}, channel_dim={self.channel_dim}"
