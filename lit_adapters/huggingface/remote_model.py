"""A model of transformers whose activations were learned; it needs transformers and PyTorch alone.

lit-adapters wrote this file beside the weights: `from_pretrained(..., trust_remote_code=True)` reads it. A learned
activation is a rational function for each group of channels (NoRA, arXiv 2509.13240), or the pretrained activation with
a shift and a gain before and after it (GroupAffine).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as PretrainedConfig  # BASE CONFIG
from transformers import LlamaForCausalLM as PretrainedModel  # BASE MODEL


class RationalActivation(nn.Module):
    """y = R(x), or y = act(x) + R(x) - R_base(x), with R = P / Q, P = a_0 + ... + a_m x^m.

    Q = 1 + |b_1 x + ... + b_n x^n| ("abs-of-sum") or 1 + |b_1 x| + ... + |b_n x^n| ("sum-of-abs"), in float32.
    """

    def __init__(
        self, pretrained: nn.Module, groups: int, degrees: list[int], form: str, channel_dim: int, anchored: bool
    ) -> None:
        super().__init__()
        self.form, self.channel_dim = form, channel_dim
        self.anchor = pretrained if anchored else None
        m, n = degrees
        self.numerator = nn.Parameter(torch.zeros(groups, m + 1))
        self.denominator = nn.Parameter(torch.zeros(groups, n))
        self.register_buffer("base_numerator", torch.zeros(groups, m + 1) if anchored else None)
        self.register_buffer("base_denominator", torch.zeros(groups, n) if anchored else None)

    def forward(self, x: Tensor) -> Tensor:
        change = self.rational(x, self.numerator, self.denominator)
        if self.anchor is None:
            return change.to(x.dtype)
        y: Tensor = self.anchor(x)
        return y + (change - self.rational(x, self.base_numerator, self.base_denominator)).to(y.dtype)  # type: ignore[arg-type]

    def rational(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """R(x) in float32; x = u / v with |u| and v at most 1, so that no power overflows."""
        grouped = x.float().movedim(self.channel_dim, -1).unflatten(-1, (len(a), -1))
        v = grouped.abs().clamp(min=1).reciprocal()
        u = grouped * v
        p = powers(a.float(), u, v)
        b = nn.functional.pad(b.float(), (1, 0))
        s = powers(b, u, v).abs() if self.form == "abs-of-sum" else powers(b.abs(), u.abs(), v)
        m, n = a.shape[1] - 1, b.shape[1] - 1
        r = p * v ** (n - m) / (v**n + s)
        return r.flatten(-2).movedim(-1, self.channel_dim)


def powers(c: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """c_0 v^k + c_1 u v^(k-1) + ... + c_k u^k for each group (G, k + 1), by Horner's rule."""
    columns = c.unsqueeze(-1).unbind(1)
    total, power = columns[-1].expand_as(u), v
    for column in reversed(columns[:-1]):
        total = total * u + column * power
        power = power * v
    return total


class AffineActivation(nn.Module):
    """y = (1 + s) act((1 + u) x + v) + t, with one (u, v, s, t) for each group of channels."""

    def __init__(self, pretrained: nn.Module, groups: int, channel_dim: int) -> None:
        super().__init__()
        self.activation, self.channel_dim = pretrained, channel_dim
        self.before = nn.Parameter(torch.zeros(groups, 2))
        self.after = nn.Parameter(torch.zeros(groups, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.activation(self.line(x, self.before)), self.after)

    def line(self, x: Tensor, values: Tensor) -> Tensor:
        """(1 + gain) x + shift."""
        gain, shift = (self.spread(column, x) for column in values.float().unbind(1))
        return ((1 + gain) * x.float() + shift).to(x.dtype)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """The value of each channel, in a shape that broadcasts with x."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.repeat_interleave(x.shape[self.channel_dim] // len(values)).view(shape)


KINDS = {"rational": RationalActivation, "affine": AffineActivation}


class LearnedConfig(PretrainedConfig):
    """The configuration of the pretrained model, and `learned_activations`: settings by the name of the module."""

    model_type = "learned_activations"  # BASE TYPE

    def __init__(self, learned_activations: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.learned_activations = learned_activations or {}


class LearnedModel(PretrainedModel):  # type: ignore[misc, valid-type]
    """The pretrained model with learned activations in their places."""

    config_class = LearnedConfig

    def __init__(self, config: LearnedConfig, *args: Any, **kwargs: Any) -> None:
        # Heads of several architectures build their model from a configuration of the class that transformers knows.
        config.__class__ = PretrainedConfig  # type: ignore[assignment]
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = LearnedConfig
        self.loss_type = "ForCausalLM"  # BASE LOSS
        for name, settings in config.learned_activations.items():
            path, _, attribute = name.rpartition(".")
            parent = self.get_submodule(path)
            kind = KINDS[settings["kind"]]
            rest = {key: value for key, value in settings.items() if key != "kind"}
            learned = kind(getattr(parent, attribute), **rest)
            setattr(parent, attribute, learned)
            # Of each by its whole name, as a layer of the model may be called alike.
            kept = [f"{name}.{key}$" for key in (*learned._parameters, *learned._buffers)]
            self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *kept}
