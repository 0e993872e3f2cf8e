"""NoRA: learnable group-wise rational functions in the place of fixed activations (arXiv 2509.13240).

    h ── act (frozen) ──►            becomes         h ── R(h; a, b) ──►     (or act(h) + R(h; a, b) - R(h; a0, b0))

    R(x; a, b) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   degrees (m, n) = (5, 4), one function for each of G groups
    a = a0 + c (alpha/r) (B_num A_num) sigma_num         B (G, r) zero, A (r, m+1), (r, n) Kaiming-uniform(sqrt 5)
    b = b0 + c (alpha/r) (B_den A_den) sigma_den

a0, b0 fit the pretrained activation and are frozen. scaling="none" is the published method: c sigma = 1. scaling=
"density" (ours) divides each direction by what it does to the function on the layer's own inputs x:
sigma_num,i = 1 / rms(x^i / Q), sigma_den,j = 1 / rms(x^j P / Q^2), so that a unit of each coefficient's update moves
the function equally; c = `scale`. base="anchored" (ours) keeps act itself and adds the change
of R alone: the start is the pretrained model bit for bit.

Parameters an activation: r (2G + m + 1 + n), 78 at the defaults; G (m + 1 + n) = 80 with rank=None, which trains the
coefficients directly (without alpha/r). Trained as a function it is not mergeable into weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from lit_adapters.activations import is_known_activation
from lit_adapters.errors import AdapterError
from lit_adapters.layout import channel_layout
from lit_adapters.methods.base import AdapterModule, Method
from lit_adapters.methods.nora_activation import PRESET_RANGE, NoRAActivation
from lit_adapters.ops import Denominator
from lit_adapters.ops.rational import MAX_DEGREE


@dataclass
class NoRA(Method):
    """Configuration of NoRA.

    Args:
        groups: G, the number of functions a layer; must divide the layer's channels.
        rank: r of the coefficient updates; None trains the coefficients directly.
        alpha: the updates are multiplied by alpha / rank.
        degrees: (m, n) of numerator and denominator.
        denominator: "abs-of-sum" (the paper's text) or "sum-of-abs" (the released kernels).
        base: "rational" replaces the activation by its fit, "anchored" keeps it and adds the change of the fit.
        fit_range: interval of the fit, or "calibrate" to fit on the range that `lit_adapters.calibrate` measures.
        scaling: "density" normalises updates by their effect on the function, "none" is the published method.
        scale: c, the common factor of density-normalised updates.
        targets: "activations" (those of the MLPs), a list of name suffixes, or a regular expression for whole names.
        exclude: name suffixes of modules to leave alone.
        channel_dim: dimension that holds the channels; "auto" takes 1 after convolutions, -1 after linear layers.

    Raises:
        AdapterError: a value is out of range.
    """

    name: ClassVar[str] = "nora"
    merges: ClassVar[str] = "no, it stays a function"
    kind: ClassVar[str] = "activation"

    groups: int = 8
    rank: int | None = 3
    alpha: float = 6.0
    degrees: tuple[int, int] = (5, 4)
    denominator: Denominator = "abs-of-sum"
    base: Literal["rational", "anchored"] = "rational"
    fit_range: tuple[float, float] | Literal["calibrate"] = PRESET_RANGE
    scaling: Literal["density", "none"] = "density"
    scale: float = 0.3
    targets: str | Sequence[str] = "activations"
    exclude: Sequence[str] = ()
    channel_dim: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self.normalise_targets()
        if len(self.degrees) != 2 or not all(1 <= d <= MAX_DEGREE for d in self.degrees):
            raise AdapterError(f"degrees {self.degrees!r} must be two numbers between 1 and {MAX_DEGREE}, as in (5, 4)")
        self.degrees = (int(self.degrees[0]), int(self.degrees[1]))
        if self.fit_range != "calibrate":
            self.fit_range = _interval(self.fit_range)
        if self.groups < 1:
            raise AdapterError(f"groups {self.groups} must be at least 1")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank} must be at least 1, or None to train coefficients directly")
        choices = {
            "denominator": get_args(Denominator),
            "base": ("rational", "anchored"),
            "scaling": ("density", "none"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise AdapterError(f"{field} {getattr(self, field)!r} must be one of {', '.join(map(repr, allowed))}")
        if not isinstance(self.channel_dim, int) and self.channel_dim != "auto":
            raise AdapterError(f"channel_dim {self.channel_dim!r} must be a dimension, as 1 or -1, or 'auto'")
        if not self.scale > 0:
            raise AdapterError(f"scale {self.scale} must be positive")

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        if not is_known_activation(base):
            raise AdapterError(
                f"NoRA adapts pointwise activations; {qualified_name!r} is a {type(base).__name__}. "
                f"Leave it out with exclude=[{qualified_name!r}]"
            )
        layout = channel_layout(parent, qualified_name.rpartition(".")[2])
        channel_dim = layout.channel_dim if self.channel_dim == "auto" else self.channel_dim
        if channel_dim is None:
            raise AdapterError(
                f"cannot tell which dimension of the input of {qualified_name!r} holds the channels ({layout.reason}); "
                "set channel_dim to 1 (after convolutions) or -1 (after linear layers)"
            )
        if layout.channels is not None and layout.channels % self.groups:
            raise AdapterError(
                f"{self.groups} groups do not divide the {layout.channels} channels of {qualified_name!r}; "
                f"choose groups among the divisors of {layout.channels}"
            )
        device = next((t.device for t in (*parent.parameters(), *parent.buffers())), torch.device("cpu"))
        return NoRAActivation(base, self, channel_dim, device)


def _interval(ends: object) -> tuple[float, float]:
    if isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2:
        low, high = float(ends[0]), float(ends[1])
        if -math.inf < low < high < math.inf:
            return low, high
    raise AdapterError(f"fit_range {ends!r} must be an interval (low, high) or 'calibrate'")
