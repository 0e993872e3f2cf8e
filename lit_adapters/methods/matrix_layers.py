"""Layers whose weight is a matrix W (out, in): how each kind stores W, and how it applies W or a low-rank pair.

A convolution has the matrix (out, in * kernel size), which multiplies the unfolded patches of its input.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.hooks import has_own_forward
from lit_adapters.methods.quantised import foreign_quantisation, is_foreign_tensor, plain_values

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_OLD_SIZES = ("infeatures", "outfeatures")  # of GPTQ
_PLAIN_FORWARDS = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


class LinearLayer:
    """nn.Linear: the weight is the matrix, y = x W^T + bias."""

    channel_dim = -1  # the dimension of the channels in the output and in A x
    keeps_dtype = False  # whether the output has the dtype of the input even under autocast
    low_rank = True  # whether B(A x) can be computed without forming B A
    can_read = True  # whether the matrix can be told
    is_packed = False  # whether the weight is stored in a quantised form; merging makes it a plain one

    def size(self, base: Any) -> tuple[int, int]:
        """The size (out, in) of the matrix."""
        return base.out_features, base.in_features

    def device(self, base: Any) -> torch.device:
        """Where the layer is."""
        device: torch.device = base.weight.device
        return device

    def dtype(self, base: Any) -> torch.dtype:
        """The dtype of a weight that replaces the pretrained one."""
        dtype: torch.dtype = base.weight.dtype
        return dtype

    def compute_dtype(self, base: Any, x: Tensor) -> torch.dtype:
        """The dtype in which the layer computes for this input without autocast."""
        return x.dtype

    def matrix(self, base: Any, weight: Tensor) -> Tensor:
        """The weight as a matrix (out, in); a view of it unless it is quantised."""
        return weight

    def stored(self, base: Any, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the layer's weight."""
        return matrix

    def apply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The output of the layer with `weight` (in the layer's layout) in place of its own, bias included."""
        return F.linear(x, weight, base.bias)

    def multiply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        """As `apply`, but without the bias."""
        return F.linear(x, weight)

    def down(self, base: Any, x: Tensor, a: Tensor) -> Tensor:
        """A x, for A (r, in)."""
        return F.linear(x, a)

    def up(self, base: Any, z: Tensor, b: Tensor) -> Tensor:
        """B z, for B (out, r)."""
        return F.linear(z, b)

    def with_weight(self, base: Any, weight: Tensor) -> Any:
        """The layer with `weight` as its own: the same layer, or a new one if its storage cannot hold the weight."""
        base.weight.data.copy_(weight)
        return base

    def per_channel(self, base: Any, values: Tensor) -> Tensor:
        """One value for each output channel (out,), shaped to multiply the output."""
        return values


class TransposedLayer(LinearLayer):
    """transformers' Conv1D, as in GPT-2: the weight is (in, out)."""

    def size(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def matrix(self, base: Any, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, base: Any, matrix: Tensor) -> Tensor:
        return matrix.t()

    def apply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(base.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    def multiply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class ConvolutionLayer(LinearLayer):
    """nn.Conv1d, 2d and 3d: A has the kernel, stride and padding of the layer, B is a 1 x 1 convolution."""

    def __init__(self, base: Any) -> None:
        self.low_rank = base.groups == 1
        self.channel_dim = 1 - base.weight.dim()  # from the end, as an input may have no batch

    def size(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[0], base.weight[0].numel()

    def matrix(self, base: Any, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, base: Any, matrix: Tensor) -> Tensor:
        return matrix.view(base.weight.shape)

    def apply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = base._conv_forward(x, weight, base.bias)  # handles the padding modes
        return y

    def multiply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = base._conv_forward(x, weight, None)
        return y

    def down(self, base: Any, x: Tensor, a: Tensor) -> Tensor:
        z: Tensor = base._conv_forward(x, a.view(-1, *base.weight.shape[1:]), None)
        return z

    def up(self, base: Any, z: Tensor, b: Tensor) -> Tensor:
        dimensions = base.weight.dim() - 2
        convolution = list(_CONVOLUTIONS.values())[dimensions - 1]
        return convolution(z, b.view(*b.shape, *[1] * dimensions))

    def per_channel(self, base: Any, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (base.weight.dim() - 2))


class QuantisedLayer(LinearLayer):
    """bitsandbytes' Linear4bit: the matrix is the weight, dequantised to the dtype in which the layer computes."""

    keeps_dtype = True
    is_packed = True

    def __init__(self, base: Any) -> None:
        stop_repacking(base)

    def dtype(self, base: Any) -> torch.dtype:
        state = getattr(base.weight, "quant_state", None)
        dtype: torch.dtype = base.weight.dtype if state is None else state.dtype
        return dtype

    def compute_dtype(self, base: Any, x: Tensor) -> torch.dtype:
        return base.compute_dtype or x.dtype

    def matrix(self, base: Any, weight: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(getattr(weight, "quant_state", None))
        if state is None:  # not quantised yet: that happens when the layer moves to a device
            return weight
        state.dtype = base.compute_dtype or torch.float32
        matrix: Tensor = dequantize_4bit(weight.data, state)
        return matrix

    def apply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        bias = None if base.bias is None else base.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def multiply(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight).to(x.dtype)

    def with_weight(self, base: Any, weight: Tensor) -> nn.Linear:
        return _plain_layer(base, weight)


class ForeignLayer(LinearLayer):
    """A linear layer that another library quantised: it is called, and its weight is not needed.

    The matrix can be read where the weight dequantises itself (torchao, quanto) or is bitsandbytes' of 8 bit.
    """

    is_packed = True

    def __init__(self, base: Any, qualified_name: str) -> None:
        self._name = qualified_name
        weight = base._parameters.get("weight")
        self.can_read = weight is not None and (is_foreign_tensor(weight) or _scales(base) is not None)

    def size(self, base: Any) -> tuple[int, int]:
        inputs, outputs = ("in_features", "out_features") if hasattr(base, "in_features") else _OLD_SIZES
        return getattr(base, outputs), getattr(base, inputs)

    def device(self, base: Any) -> torch.device:
        tensors = (*base.parameters(), *base.buffers(), *vars(base).values())
        return next(t.device for t in tensors if isinstance(t, Tensor))

    def dtype(self, base: Any) -> torch.dtype:
        tensors = base._parameters.get("bias"), base._parameters.get("weight")
        return next((t.dtype for t in tensors if t is not None and t.is_floating_point()), torch.float32)

    def matrix(self, base: Any, weight: Any) -> Tensor:
        """The dequantised weight.

        Raises:
            AdapterError: Only the library that has quantised the layer can read it.
        """
        if not self.can_read:
            raise AdapterError(
                f"the weight of {self._name!r}, {foreign_quantisation(base)}, cannot be read; keep the adapter, or "
                "dequantise the model"
            )
        scales = _scales(base)
        if scales is not None:
            return weight.detach().float() * (scales / 127)[:, None]
        return plain_values(weight.detach())

    def with_weight(self, base: Any, weight: Tensor) -> nn.Linear:
        return _plain_layer(base, weight)


def _scales(base: Any) -> Tensor | None:
    """The scale of each row (out,) of bitsandbytes' Linear8bitLt; None for other layers, and where W is not int8."""
    weight = base._parameters.get("weight")
    if type(weight).__name__ != "Int8Params" or weight.dtype != torch.int8:
        return None
    state = getattr(base, "state", None)
    scales: Tensor | None = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    return scales


def _plain_layer(base: Any, weight: Tensor) -> nn.Linear:
    """nn.Linear with this weight and the bias of `base`."""
    bias = base._parameters.get("bias")
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
    return plain.train(base.training)


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' Linear4bit; recognised by name, as the library is optional."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)


def stop_repacking(layer: Any) -> None:
    """Keep the weight of a Linear4bit in the form that quantisation gave it.

    On processors with AVX512-bf16, bitsandbytes 0.50 repacks the weight in the first forward in eval mode without
    gradients. From then on it dequantises to wrong values, and training gives the input no gradient. This function
    turns repacking off and undoes it if it has happened; the scales of the blocks stay rounded to bfloat16 then.
    """
    layer.support_avx512bf16_for_cpu = False
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    dtype, state.original_dtype = state.original_dtype, torch.float32  # also if scales are quantised themselves
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.dtype = dtype
    if not state.nested:  # plain scales are still in the order of the repacked weight
        state.absmax = state.absmax.T.flatten().float()


@torch.no_grad()
def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer or convolution computes what its base class in torch.nn computes.

    A layer with a forward of its own is run once to find out. Some compute something else: routers of experts,
    convolutions that standardise their weight or pad their input, and the like.
    """
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return True
    if type(module).forward in _PLAIN_FORWARDS and not has_own_forward(module):
        return True
    if is_quantised(module) or foreign_quantisation(module):  # `matrix_layer` accepts or refuses them
        return True
    weight: Tensor = module.weight  # type: ignore[assignment]
    layer: LinearLayer
    if isinstance(module, nn.Linear):
        layer, shape = LinearLayer(), [2, module.in_features]
    else:
        layer = ConvolutionLayer(module)
        extent = [3 * d * k + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]  # type: ignore[arg-type]
        shape = [2, int(weight.shape[1] * module.groups), *extent]  # type: ignore[operator]
    count = math.prod(shape)
    x = torch.linspace(-1, 1, count, dtype=weight.dtype, device=weight.device).view(shape)  # drawn from no random state
    try:
        y, expected = module(x), layer.apply(module, x, weight)
    except Exception:  # any error: it does not accept the input of a plain layer
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-3)


def matrix_layer(base: nn.Module, qualified_name: str, method: str, needs_weight: bool = True) -> LinearLayer:
    """How `base` stores and applies its matrix.

    Args:
        base: The layer to adapt.
        qualified_name: Its name in the model, for messages.
        method: The name of the method, for messages.
        needs_weight: Whether the method reads the weight; others call the layer, however it is quantised.

    Raises:
        AdapterError: `base` is not a layer with a weight matrix, its weight is not a plain parameter, or it does not
            compute what a plain layer computes.
    """
    leave_out = f"leave it out with exclude=[{qualified_name!r}]"
    kind: LinearLayer | None = None
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise AdapterError(
            f"{qualified_name!r} belongs to an nn.MultiheadAttention, which reads its weights without calling it, so "
            f"that no adapter on it would run; {leave_out}"
        )
    if is_quantised(base):
        kind = QuantisedLayer(base)
    elif quantised := foreign_quantisation(base):
        if not needs_weight and not isinstance(base, nn.modules.conv._ConvNd):
            return ForeignLayer(base, qualified_name)
        raise AdapterError(
            f"{method} cannot read the quantised weight of {qualified_name!r}, {quantised}; use LoRA, AFALoRA or VeRA, "
            f"which do not need it, quantise to NF4 (4 bit) with bitsandbytes, dequantise the model, or {leave_out}"
        )
    elif isinstance(base, tuple(_CONVOLUTIONS)):
        kind = ConvolutionLayer(base)
    elif isinstance(base, nn.Linear):
        kind = LinearLayer()
    elif type(base).__name__ == "Conv1D" and type(base).__module__.startswith("transformers."):
        kind = TransposedLayer()
    if kind is None:
        why = {
            nn.MultiheadAttention: "nn.MultiheadAttention keeps q, k and v in one parameter outside any layer",
            nn.Embedding: "an embedding looks rows up instead of multiplying by a matrix",
        }.get(type(base), f"this is a {type(base).__name__}")
        raise AdapterError(
            f"{method} adapts linear layers and convolutions, and {qualified_name!r} is neither: {why}; {leave_out}"
        )
    if "weight" not in base._parameters or isinstance(vars(base).get("bias"), Tensor):
        raise AdapterError(
            f"the weight or bias of {qualified_name!r} is computed by a parametrisation; remove that with "
            "parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove of "
            f"torch.nn.utils, or {leave_out}"
        )
    if not is_plain(base):
        what = "has a `forward` of its own" if has_own_forward(base) else f"is a {type(base).__name__}"
        raise AdapterError(
            f"{qualified_name!r} {what}, which does not do what a plain layer with its weight does; {leave_out}"
        )
    return kind
