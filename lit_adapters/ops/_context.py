"""What is active around an operation: autocast, the transforms of torch.func, and tracers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

from lit_adapters.errors import AdapterError

# Newer versions of torch have names that leave torch.export and torch.compile out.
_fx_is_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
_plain_call = nn.Module.__call__  # torch.fx puts another one in its place while it traces


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of `tensor` now; None without autocast.

    PyTorch knows no autocast for the meta device and raises if it is asked.
    """
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `tensor`; costs nothing where autocast is off already."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def exporting() -> bool:
    """Whether torch.export records the operations now, for itself, for ONNX or for AOTInductor."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # torch 2.6 tells only of an export that is not strict.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling() and _fx_is_tracing()


def transformed() -> bool:
    """Whether the plain formula in PyTorch's own operators must run, as something records or transforms operations.

    True under the transforms of torch.func and in forward mode, under torch.export, torch.jit.trace, both ONNX
    exporters and the tracers of torch.fx: what they record has to run where this package is not there, for values that
    change. False under torch.compile, which traces the custom operators itself.
    """
    if torch.compiler.is_compiling():
        return exporting()
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    # The second question of torch.fx is slow, and the first answers it almost always.
    return torch._C._is_tracing() or (nn.Module.__call__ is not _plain_call and _fx_is_tracing())


_INSTEAD = "use torch.export.export or torch.jit.trace, which record what a call computes"


def refuse_symbols(name: str) -> None:
    """Raise if torch.fx traces without values, by symbols that stand in for tensors.

    Args:
        name: Of the layer, for the message.

    Raises:
        AdapterError: torch.fx.symbolic_trace is running.
    """
    if nn.Module.__call__ is _plain_call or torch.compiler.is_compiling() or not _fx_is_tracing():
        return
    if not torch._C._len_torch_dispatch_stack():  # make_fx, which has values, is a dispatch mode
        raise AdapterError(
            f"torch.fx.symbolic_trace cannot follow {name!r}, which asks its input for dtype and sizes; {_INSTEAD}"
        )


def unscriptable(name: str) -> str:
    """Why torch.jit.script cannot compile a layer of ours, and what to do."""
    return f"torch.jit.script cannot compile {name!r}, which chooses between formulas in Python; {_INSTEAD}"


def has_sizes() -> bool:
    """Whether the sizes of tensors are numbers. Under torch.jit.trace they are tensors: a check would warn."""
    return not torch.jit.is_tracing()
