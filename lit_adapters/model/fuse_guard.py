"""Keeps blocks with adapters from being fused: methods such as timm's `reparameterize` read the pretrained weights.

They build one convolution of several layers, and the adapters would vanish without a word.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule

# In timm, torchvision, and implementations of RepVGG, LeViT, YOLO and similar networks.
_METHODS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_model", "repvgg_convert")


class FuseGuard:
    """Stands for one method of a block while it holds adapters.

    Args:
        block: The block.
        name: The name of the method.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method if it is given tensors, as then it takes part in a forward.

        Raises:
            AdapterError: No argument is a tensor.
        """
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return getattr(type(self._block), self._name)(self._block, *args, **kwargs)
        raise AdapterError(
            f"{type(self._block).__name__}.{self._name} would drop the adapters of this block, as it reads the "
            "pretrained weights; call lit_adapters.merge(model) first"
        )


def guard_fusing(model: nn.Module) -> None:
    """Put guards before the methods that fuse, in every part of `model` that holds an adapter of weights."""
    for module in model.modules():
        names = [name for name in _METHODS if callable(getattr(type(module), name, None)) and name not in vars(module)]
        if names and any(isinstance(m, AdapterModule) and m.merges_into for m in module.modules()):
            vars(module).update({name: FuseGuard(module, name) for name in names})


def free_fusing(model: nn.Module) -> None:
    """Take the guards away."""
    for module in model.modules():
        for name in [name for name in _METHODS if isinstance(vars(module).get(name), FuseGuard)]:
            del vars(module)[name]
