"""Base of the configurations of methods that give each group of channels its own activation function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_adapters.activations import is_known_activation
from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.channels import Layout, channel_layout
from lit_adapters.methods.hooks import has_own_forward
from lit_adapters.methods.method import Method
from lit_adapters.values import check_whole

CHANNELS = "channels"  # value of `groups`
_MOST_GROUPS = 1 << 16
_MOST_DIMS = 8


class ActivationMethod(Method):
    """Base of the methods that give each of G contiguous groups of channels an activation function of its own.

    Attributes:
        groups: G; must divide the channels of every adapted layer. "channels" gives each channel its own function.
        channel_dim: The dimension of the activation's input that holds the channels, or "auto".
        one_row_a_group: Names of tensors in files that have a row for each group.
        placeholder_activation: What stands for the activation where only a file is known.
    """

    merges: ClassVar[str] = "no, it stays a function"
    kind: ClassVar[str] = "activation"
    one_row_a_group: ClassVar[tuple[str, ...]]
    placeholder_activation: ClassVar[type[nn.Module]] = nn.GELU  # of no consequence where a file holds the functions

    groups: int | Literal["channels"]
    channel_dim: int | Literal["auto"]

    def adapter(
        self, base: nn.Module, qualified_name: str, groups: int, channel_dim: int, device: torch.device
    ) -> AdapterModule:
        """The adapter around an activation.

        Args:
            base: The activation.
            qualified_name: Its name in the model.
            groups: The number of groups of this layer.
            channel_dim: The dimension of the input that holds the channels.
            device: Where the adapter's tensors go.
        """
        raise NotImplementedError

    def check_groups(self) -> None:
        """Check the settings that all of these methods share.

        Raises:
            AdapterError: `groups` or `channel_dim` is out of range.
        """
        if self.groups != CHANNELS:
            check_whole("groups", self.groups, high=_MOST_GROUPS, otherwise=f"or {CHANNELS!r}")
        if self.channel_dim != "auto":
            check_whole("channel_dim", self.channel_dim, -_MOST_DIMS, _MOST_DIMS, "or 'auto'")

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        """The adapter around an activation.

        Raises:
            AdapterError: The layer is not a known activation, its `forward` was replaced, the dimension or the number
                of its channels is not known, or the groups do not divide the channels.
        """
        if not is_known_activation(base):
            raise AdapterError(
                f"{type(self).__name__} adapts pointwise activations; {qualified_name!r} is a {type(base).__name__}. "
                f"Leave it out with exclude=[{qualified_name!r}]"
            )
        if has_own_forward(base):
            raise AdapterError(
                f"the `forward` of {qualified_name!r} was replaced on this one {type(base).__name__}, so that its "
                f"class does not tell its function; put the class's own back, or set exclude=[{qualified_name!r}]"
            )
        layout = channel_layout(parent, qualified_name.rpartition(".")[2])
        channel_dim = layout.channel_dim if self.channel_dim == "auto" else self.channel_dim
        if channel_dim is None:
            raise AdapterError(
                f"cannot tell which dimension of the input of {qualified_name!r} holds the channels ({layout.reason}); "
                "set channel_dim to 1 (after convolutions) or -1 (after linear layers)"
            )
        groups = self._groups_of(layout, qualified_name)
        device = next((t.device for t in (*parent.parameters(), *parent.buffers())), torch.device("cpu"))
        return self.adapter(base, qualified_name, groups, channel_dim, device)

    def _groups_of(self, layout: Layout, qualified_name: str) -> int:
        if isinstance(self.groups, str):
            if layout.channels is None:
                raise AdapterError(
                    f"cannot tell how many channels {qualified_name!r} has; set groups to their number instead of "
                    f"{CHANNELS!r}"
                )
            return layout.channels
        if layout.channels is not None and layout.channels % self.groups:
            raise AdapterError(
                f"{self.groups} groups do not divide the {layout.channels} channels of {qualified_name!r}; "
                f"choose groups among the divisors of {layout.channels}"
            )
        return self.groups

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule:
        """As for any method, around `placeholder_activation`, as a file does not hold the activation.

        Raises:
            AdapterError: `groups` is "channels", and no tensor has a row for each group.
        """
        groups = self.groups
        if isinstance(groups, str):
            sizes = [t.shape[0] for name, t in tensors.items() if name in self.one_row_a_group and t.dim()]
            if not sizes or not 1 <= sizes[0] <= _MOST_GROUPS:
                raise AdapterError(f"{qualified_name!r} lacks the tensors of its groups")
            groups = sizes[0]
        return self.adapter(self.placeholder_activation(), qualified_name, groups, -1, torch.device("meta"))
