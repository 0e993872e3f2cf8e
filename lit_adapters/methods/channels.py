"""Finds out from the layers around an activation which dimension of its input holds the channels, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lit_adapters.methods.quantised import foreign_quantisation

# Recognised by class name, so that transformers' Conv1D (a linear layer) and a quantised layer need no import.
_LINEAR_NAMES = {"Conv1D", "Linear4bit"}


@dataclass(frozen=True)
class Layout:
    """Where the channels of an activation's input are.

    Attributes:
        channel_dim: The dimension that holds the channels; None if it cannot be told.
        channels: The number of channels; None if it cannot be told.
        reason: Why `channel_dim` is None.
    """

    channel_dim: int | None
    channels: int | None = None
    reason: str = ""


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies the last dimension of its input by a matrix."""
    if isinstance(module, nn.Linear) or type(module).__name__ in _LINEAR_NAMES:
        return True
    return not isinstance(module, nn.modules.conv._ConvNd) and foreign_quantisation(module) != ""


def is_pointwise_conv(module: nn.Module) -> bool:
    """Whether `module` is a 1 x 1 convolution, which is a linear layer on the channels of an image."""
    return isinstance(module, nn.Conv2d) and tuple(module.kernel_size) == (1, 1)


def _channel_dim(module: nn.Module) -> int | None:
    """The dimension of the channels of an output; from the end where the module tells, as there may be no batch."""
    if is_linear(module):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    name = type(module).__name__
    if "Norm" in name and ("2d" in name or "3d" in name):  # of PyTorch, or timm's LayerNorm2d and its kin
        return -3 if "2d" in name else -4
    if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
        return 1
    return -1 if isinstance(module, nn.LayerNorm) else None


def _width(module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    return next((int(getattr(module, a)) for a in attributes if hasattr(module, a)), None)


def _outputs(module: nn.Module) -> int | None:
    return _width(module, ("out_features", "out_channels", "nf", "outfeatures"))


def _inputs(module: nn.Module) -> int | None:
    return _width(module, ("in_features", "in_channels", "nx", "infeatures"))


def channel_layout(parent: nn.Module, attribute: str) -> Layout:
    """The layout of the input of the activation `parent.attribute`, read from its siblings in the order of definition.

    The last layer before the activation decides, unless that layer is a convolution and the next one is linear, which
    means that something is flattened or permuted on one side. If no layer comes before, all siblings must agree.

    The number of channels is known only if the next layer takes as many as the previous one gives, or if exactly one
    layer comes before and none after: a gated MLP gives its activation half of them, and a LLaMA MLP defines its
    activation last.
    """
    if (own := _channel_dim(parent)) not in (-1, None):  # timm's BatchNormAct2d holds its own activation
        return Layout(own, getattr(parent, "num_features", None))
    position = list(parent._modules).index(attribute)
    siblings = [(i - position, m) for i, m in enumerate(parent._modules.values()) if m is not None and i != position]
    before = [m for i, m in siblings if i < 0 and _channel_dim(m) is not None]
    after = [m for i, m in siblings if i > 0 and _inputs(m) is not None]
    dims = {d for _, m in siblings if (d := _channel_dim(m)) is not None}
    following = next((m for i, m in siblings if i > 0 and not isinstance(m, (nn.Dropout, nn.Identity))), None)
    convolution = bool(before) and isinstance(before[-1], nn.modules.conv._ConvNd)
    if convolution and following is not None and _channel_dim(following) == -1:
        return Layout(None, reason=f"its neighbours are {type(before[-1]).__name__} and {type(following).__name__}")
    if before:
        channel_dim = _channel_dim(before[-1])
    elif len(dims) == 1:
        channel_dim = dims.pop()
    elif dims and -1 not in dims:  # a convolution and a GroupNorm, say
        channel_dim = 1
    else:
        kinds = sorted({type(m).__name__ for _, m in siblings}) or ["none"]
        return Layout(None, reason=f"its neighbours are {', '.join(kinds)}")
    makers = [m for m in before if _outputs(m) is not None]
    made = _outputs(makers[-1]) if makers else None
    consistent = (after and _inputs(after[0]) == made) or (not after and len(makers) == 1)
    return Layout(channel_dim, made if consistent else None)
