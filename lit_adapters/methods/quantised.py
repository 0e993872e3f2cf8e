"""Recognises layers that another library quantised, in a form that adapters cannot read.

bitsandbytes' Linear4bit (NF4, FP4) is the one such layer that is supported. Libraries are recognised without importing
them: by the class of the layer, by that of its weight, or by a dtype that nothing is computed in.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

# Parts of the names of such classes of layers.
_CLASS = re.compile(
    r"(?i:quant(?!um|ile|ity)|qlinear|hqq|fp8|float8|bitlinear|8bit|4bit|mxfp4|eetq|aqlm|vptq|spqr|higgs)|Int[48]"
)
_LIBRARY = re.compile(r"(torchao|torch\.ao|optimum\.quanto|hqq|auto_gptq|gptqmodel|awq|aqlm|vptq|eetq)\.")
_PACKED = {"qweight", "W_q", "weight_packed", "packed_weight", "codebooks"}  # names of weights in other forms
# Classes of tensors that only say how a plain tensor is stored or traced.
_PLAIN_TENSORS = ("torch.nn.", "torch.distributed.", "torch._subclasses.", "torch._higher_order_ops.")


def foreign_quantisation(module: nn.Module) -> str:
    """How another library quantised a linear layer or convolution, in a few words; empty if none did."""
    kinds = type(module).__mro__
    if any(kind.__name__ == "Linear4bit" for kind in kinds) or not _multiplies(module):
        return ""
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is not None and is_foreign_tensor(weight):
        return f"a {name} whose weight is a {type(weight).__name__} of {_library(type(weight))}"
    if weight is not None and not (weight.is_complex() or (weight.is_floating_point() and weight.dtype.itemsize > 1)):
        return f"a {name} whose weight is of {weight.dtype}"
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.nn.")]
    if any(_CLASS.search(kind.__name__) or _LIBRARY.match(f"{kind.__module__}.") for kind in own):
        return f"a {name} of {_library(type(module))}"
    packed = _PACKED & {*module._parameters, *module._buffers, *vars(module)}
    return f"a {name} that holds {min(packed)!r} in place of a weight" if packed else ""


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return True
    sizes = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    return any(hasattr(module, inputs) and hasattr(module, outputs) for inputs, outputs in sizes)


def _library(kind: type) -> str:
    first, _, rest = kind.__module__.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("torch", "optimum", "transformers") else first


def is_foreign_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that stores something else than plain numbers."""
    kind = type(tensor)
    if kind is Tensor or f"{kind.__module__}.".startswith(_PLAIN_TENSORS):
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain_values(tensor: Any) -> Tensor:
    """The numbers that a foreign tensor stands for; any other tensor as it is."""
    values: Tensor = tensor.dequantize() if is_foreign_tensor(tensor) else tensor
    return values
