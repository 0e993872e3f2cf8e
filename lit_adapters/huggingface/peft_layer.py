"""The layer that peft sees: a pretrained module with one adapter of ours for each of peft's adapter names."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule

PREFIX = "lit_"


class AdaptedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A pretrained module with several adapters; one acts at a time.

    The computation is that of `AdapterModule.forward`.

    Args:
        base_layer: The pretrained module.

    Attributes:
        lit_adapter: The adapters by name.
        merged_adapters: The name of the one that is merged at present, if any.
    """

    adapter_layer_names = (f"{PREFIX}adapter",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lit_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []

    def acting(self) -> AdapterModule | None:
        """The adapter that acts now; None if the pretrained module acts alone.

        Raises:
            AdapterError: Several adapters of this layer are active.
        """
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.lit_adapter]
        names = self.merged_adapters or names
        if not names:
            return None
        adapter: AdapterModule = self._one(names)
        return adapter

    def _one(self, names: list[str]) -> Any:
        if len(names) > 1:
            raise AdapterError(
                f"adapters {names} are active at the same layer, and nonlinear methods do not add up; activate one "
                "with set_adapter"
            )
        return self.lit_adapter[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.acting()
        return (self.base_layer if adapter is None else adapter)(*args, **kwargs)

    @property
    def weight(self) -> Any:
        """The pretrained weight; where the model reads it and does not call the layer, that of the acting adapter."""
        adapter = self.acting()
        return self.base_layer.weight if adapter is None or not adapter.read_as_weight else adapter.weight

    def __getattr__(self, name: str) -> Any:
        """Attributes of the pretrained module, such as `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute with merged parameters from now on; those of a function that no parameter holds stay as they are.

        Args:
            safe_merge: Whether to check that the merged parameters are finite.
            adapter_names: Which adapter; by default the active one.

        Raises:
            AdapterError: The adapter is nonlinear at present, or several are to be merged.
            ValueError: With `safe_merge`: a merged parameter is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lit_adapter]
        if not names:
            return
        adapter: AdapterModule = self._one([*self.merged_adapters, *names])
        if not adapter.merges_into:
            return
        adapter.check_mergeable()
        adapter.merge()
        merged = {name: getattr(adapter, f"merged_{name}") for name in adapter.merges_into}
        broken = [name for name, value in merged.items() if safe_merge and not torch.isfinite(value).all()]
        if broken:
            adapter.unmerge()
            raise ValueError(
                f"{broken[0]!r} of the merged {adapter.qualified_name!r} is not finite (adapter {names[0]})"
            )
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Compute with the pretrained parameters again."""
        while self.merged_adapters:
            self.lit_adapter[self.merged_adapters.pop()].unmerge()  # type: ignore[operator]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that stays when peft's model is unloaded: the pretrained one, or one with the adapter's function.

        Raises:
            AdapterError: As for `merge`.
            ValueError: As for `merge`.
        """
        names = self.merged_adapters or (self.active_adapters if adapter_names is None else adapter_names)
        names = [name for name in names if name in self.lit_adapter] if merge else []
        if merge and safe_merge:
            self.merge(safe_merge=True, adapter_names=adapter_names)
        self.unmerge()
        if not names:
            return self.base_layer
        adapter = self._one(names)
        if not adapter.merges_into:
            folded: nn.Module = adapter.folded()
            return folded
        adapter.check_mergeable()
        adapter.absorb()
        base: nn.Module = adapter.base
        return base
