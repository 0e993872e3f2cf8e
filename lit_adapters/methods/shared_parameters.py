"""Trained parameters that several layers share: the first layer of a group holds them, the others read them there.

So a model has each of them once: for files, optimisers, gradient norms and counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence

from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule


def without_numbers(qualified_name: str) -> str:
    """What the names of one layer in all blocks have in common: "blocks.3.attn.qkv" becomes "blocks.attn.qkv"."""
    return re.sub(r"(?<![^.])\d+\.", "", qualified_name)


class SharingGroup:
    """The layers that share parameters; the first of them is the holder."""

    def __init__(self) -> None:
        self.layers: list[SharingAdapter] = []

    def leave(self, layer: SharingAdapter) -> None:
        """Go on without `layer`; if it was the holder, the next layer is."""
        if layer not in self.layers or len(self.layers) == 1:
            return
        was_holder = layer is self.layers[0]
        self.layers.remove(layer)
        if was_holder:
            self.layers[0].hold({name: layer.get_parameter(name) for name in layer.shared_names})


class SharingAdapter(AdapterModule):
    """An adapter that computes with parameters of its group.

    Subclasses set `shared_names` and call `join_group`.

    Attributes:
        shared_names: The local names of the shared parameters.
        sharing: The layers that share them.
    """

    shared_names: Sequence[str] = ()
    sharing: SharingGroup

    def join_group(self, group: SharingGroup, parameters: Callable[[], dict[str, Tensor]], holder: bool | None) -> None:
        """Become a layer of `group`.

        Args:
            group: The group.
            parameters: Makes the shared parameters, by local name; called if this layer holds them.
            holder: Whether this layer holds them; by default if it is the first one of the group.
        """
        self.sharing = group
        if holder or (holder is None and not group.layers):
            for name, value in parameters().items():
                self.add_parameter(name, value)
            group.layers.insert(0, self)
        elif holder is None:
            group.layers.append(self)

    @property
    def is_holder(self) -> bool:
        """Whether the shared parameters are parameters of this layer."""
        return bool(self.shared_names) and self.shared_names[0] in self._parameters

    def shared_tensors(self, names: Sequence[str], like: Tensor) -> list[Tensor]:
        """Shared parameters, in the dtype and on the device of `like`: the holder may be on another device."""
        holder = self.sharing.layers[0]
        return [getattr(holder, name).to(like) for name in names]

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The shared parameters in the layer that holds them, if there are other layers."""
        if not self.is_holder or len(self.sharing.layers) == 1:
            return {}
        return {name: self.get_parameter(name) for name in self.shared_names}

    def hold(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hold parameters that another layer has held, by local name."""
        self._adapter_parameters += list(parameters)
        self._parameters.update(parameters)

    def unwrapped(self) -> nn.Module:
        """As for any adapter; if other layers share what this one holds, the next of them holds it."""
        self.sharing.leave(self)
        return super().unwrapped()


def join_layers_of_a_file(adapters: Iterable[tuple[Hashable, SharingAdapter]]) -> None:
    """Give the layers of each group, just built from a file, the parameters that one of them holds.

    Args:
        adapters: The layers, each with what the layers of its group have in common.

    Raises:
        AdapterError: No layer of a group holds the parameters.
    """
    layers = list(adapters)
    groups = {key: adapter.sharing for key, adapter in reversed(layers) if adapter.is_holder}
    for key, adapter in layers:
        if key not in groups:
            raise AdapterError(
                f"no layer holds the parameters that {adapter.qualified_name!r} shares; take an undamaged copy"
            )
        if not adapter.is_holder:
            adapter.sharing = groups[key]
            adapter.sharing.layers.append(adapter)
