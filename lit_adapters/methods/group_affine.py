"""GroupAffine (ours): a shift and a gain before and after each activation, in place of a learned shape.

    h ── act (frozen) ──►      becomes      h ── (1 + s) act((1 + u) h + v) + t ──►

One (u, v, s, t) for each of G contiguous groups of channels; all of them train and start at zero, where the arithmetic
is exact: the start is the pretrained model bit for bit in every dtype. (Where the input of act is a strided view, as in
ModernBERT, act gets a contiguous copy, which PyTorch may round otherwise in the last bit.) The function keeps the shape
of act. This is the control of NoRA, whose functions can do nearly the same and also change their shape: what NoRA gains
beyond it comes from the shape, or from having more parameters.

Parameters for each activation: 4 G, 32 by default. In a plain MLP the weights and biases of the linear layers before
and after the activation could hold all four. We do not fold them in, as many models have something between (gates,
norms, dropout, a second user of the output); merging leaves a plain module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_adapters.activations.affine import AffineActivation
from lit_adapters.activations.coefficients import normal_inputs
from lit_adapters.methods.activation_adapter import ASSUMED_STD, ActivationAdapter
from lit_adapters.methods.activation_method import ActivationMethod
from lit_adapters.methods.description import AdapterSummary, LearnedFunctions, each_layer
from lit_adapters.methods.hooks import move_hooks
from lit_adapters.ops.affine import group_affine

_PARTS = ("input_gain", "input_shift", "output_gain", "output_shift")


class UnknownActivation(nn.Module):
    """The activation of a layer of which only the file is known."""


@dataclass
class GroupAffine(ActivationMethod):
    """Configuration of GroupAffine.

    Args:
        groups: G, the number of functions for each layer; must divide the layer's channels. "channels" gives each
            channel its own function.
        targets: "activations" (those of the MLPs), a list of name suffixes, or a regular expression for whole names.
        exclude: Name suffixes of modules to leave alone.
        channel_dim: The dimension that holds the channels; "auto" takes that of the layers around it.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "group_affine"
    one_row_a_group: ClassVar[tuple[str, ...]] = ("input_gain",)
    placeholder_activation: ClassVar[type[nn.Module]] = UnknownActivation

    groups: int | Literal["channels"] = 8
    targets: str | Sequence[str] = "activations"
    exclude: Sequence[str] = ()
    channel_dim: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self.normalise_targets()
        self.check_groups()

    def adapter(
        self, base: nn.Module, qualified_name: str, groups: int, channel_dim: int, device: torch.device
    ) -> GroupAffineActivation:
        return GroupAffineActivation(base, qualified_name, groups, channel_dim, device)


class GroupAffineActivation(ActivationAdapter):
    """One adapted activation: (..., C, ...) with C channels -> the same shape and dtype.

    Attributes:
        input_gain: u of each group, (G,).
        input_shift: v of each group, (G,).
        output_gain: s of each group, (G,).
        output_shift: t of each group, (G,).
    """

    method = "group_affine"
    input_gain: Tensor
    input_shift: Tensor
    output_gain: Tensor
    output_shift: Tensor

    def __init__(
        self, base: nn.Module, qualified_name: str, groups: int, channel_dim: int, device: torch.device
    ) -> None:
        super().__init__(base, qualified_name, groups, channel_dim)
        for name in _PARTS:
            self.add_parameter(name, torch.empty(groups, device=device))
        self.add_density_buffers(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to zero, and assume normal inputs until calibration."""
        for parameter in self.adapter_parameters().values():
            nn.init.zeros_(parameter)
        x, _ = normal_inputs(ASSUMED_STD)
        self.set_density((x[0].item(), x[-1].item()))
        with torch.no_grad():
            self.calibrated.fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        self.check_channels(x)
        z = group_affine(x, self.input_gain, self.input_shift, self.channel_dim)  # (1 + u) x + v
        y = self.base(z)  # act(z)
        return group_affine(y, self.output_gain, self.output_shift, self.channel_dim)  # (1 + s) y + t

    def calibrate(self, values: Tensor) -> None:
        """Measure the density of the inputs on a sample (N,), for statistics and figures; functions do not change.

        Raises:
            AdapterError: The sample is empty, constant or not finite.
        """
        _, span, counts = self.measured(values)
        self.stand_alone()
        self.set_density(span, counts)
        with torch.no_grad():
            self.calibrated.fill_(1)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Gain and shift of each group before the activation, u and v (G, 2), and after it, s and t (G, 2)."""
        before = torch.stack([self.input_gain, self.input_shift], 1)
        return before, torch.stack([self.output_gain, self.output_shift], 1)

    @torch.no_grad()
    def learned_change(self, x: Tensor, coefficients: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The functions minus the pretrained activation at inputs x (D,): (G, D), float64 on the CPU; zero at first.

        Args:
            x: The inputs.
            coefficients: Those of another moment, as `coefficients` returns them; None for the present ones.
        """
        before, after = (c.double().cpu() for c in coefficients or self.coefficients())
        z = (1 + before[:, :1]) * x + before[:, 1:]
        base = self._base_in_float64()
        return (1 + after[:, :1]) * base(z) + after[:, 1:] - base(x)

    def learned_functions(self) -> LearnedFunctions | None:
        """The adapter itself; None where the activation is not known, and so neither are the functions."""
        return None if isinstance(self.base, UnknownActivation) else self

    def learned_update(self) -> Tensor:
        """u, v, s and t of each group, (4, G): what files alone can be compared by."""
        return torch.stack([getattr(self, name) for name in _PARTS]).detach()

    def summary(self) -> AdapterSummary:
        """That of the functions; the number of groups alone where the activation is not known."""
        if self.learned_functions() is not None:
            return super().summary()
        note = "its change depends on the activation, which the file does not hold"
        return AdapterSummary(f"{self.groups} groups", note=note, kind="functions")

    def _base_in_float64(self) -> nn.Module:
        """The pretrained activation on the CPU in float64; a PReLU has a weight of its own."""
        return copy.deepcopy(self.base_copy()).to("cpu", torch.float64)

    @torch.no_grad()
    def functions(self) -> tuple[Tensor, Tensor, Tensor]:
        grid = self.grid()
        initial = self._base_in_float64()(grid)
        return grid, initial, initial + self.learned_change(grid)

    def folded(self) -> AffineActivation:
        """The same function as a plain module."""
        activation = AffineActivation(self.base_copy(), *self.coefficients(), self.channel_dim)
        move_hooks(self, activation)
        return activation.requires_grad_(False).train(self.training)

    def merge_obstacle(self) -> str:
        """Neighbouring layers could hold it in some models; see the head of this file."""
        return "it changes an activation: merging leaves the activation with its shifts and gains in its place"

    def charts(self) -> dict[str, str]:
        """One chart: how far the functions are from the pretrained ones."""
        return {"functions: drift from the pretrained ones, each layer": each_layer("relative_drift")}

    def extra_repr(self) -> str:
        return f"{type(self.base).__name__}, groups={self.groups}"
