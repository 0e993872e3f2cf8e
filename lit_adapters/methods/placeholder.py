"""Layers without values, which stand for those of a base model that is not at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def plain_layers(kind: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[nn.Module]:
    """Layers on the meta device that an adapter may have been around; the likeliest comes first.

    Args:
        kind: "activation", or what the method adapts instead.
        shapes: Shapes of the layer's own parameters, by local name.
    """
    weight, bias = tuple(shapes.get("weight", ())), "bias" in shapes
    if kind == "activation":
        yield nn.GELU()
    elif len(weight) == 1:
        yield nn.LayerNorm(weight[0], bias=bias, device="meta")
    elif len(weight) == 2:
        outputs, inputs = weight
        yield nn.Linear(inputs, outputs, bias, device="meta")
        yield nn.Linear(outputs, inputs, bias, device="meta")  # transformers' Conv1D stores (in, out)
    elif len(weight) in _CONVOLUTIONS:
        outputs, inputs, *kernel = weight
        yield _CONVOLUTIONS[len(weight)](inputs, outputs, kernel, bias=bias, device="meta")  # type: ignore[arg-type]
