"""Models whose parameters are spread over processes (FSDP2): how to spread them, and how to have them whole again.

    model = shard(build, mesh)        build() makes and adapts the model; it runs in the first process only
    with gathered(adapter): ...       its own parameters are whole inside, in every process

A sharded parameter is a DTensor, told by its `full_tensor`, which every process has to call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import AdapterModule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, in every process, all of which call this; any other tensor as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of `model` is spread over processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise if `model` is sharded.

    Raises:
        AdapterError: it is, and `what` needs whole weights.
    """
    if is_sharded(model):
        raise AdapterError(
            f"{what} needs whole weights, and those of {type(model).__name__} are sharded: call "
            "lit_adapters.save_adapters in every process, then lit_adapters.load_adapters on a model of one process"
        )


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the modules' own parameters are whole, to be read; every process enters it."""
    sharded = [{n: p for n, p in m._parameters.items() if hasattr(p, "full_tensor")} for m in modules]
    try:
        for module, parameters in zip(modules, sharded, strict=True):
            for name, parameter in parameters.items():
                assert parameter is not None
                module._parameters[name] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
        yield
    finally:
        for module, parameters in zip(modules, sharded, strict=True):
            module._parameters.update(parameters)


def shard(build: Callable[[], nn.Module], mesh: DeviceMesh) -> nn.Module:
    """The model of `build()`, with every parameter spread over the processes of `mesh`.

    Each repeated block is one group of FSDP2 and the rest another. Only the first process builds, on the CPU; the
    others get the structure on the meta device, and each its shards, one parameter after the other.

    Args:
        build: makes the model and attaches its adapters.
        mesh: of Lightning's `ModelParallelStrategy`, or of one dimension.

    Raises:
        AdapterError: `build` failed, in every process; there is tensor parallelism; an adapter cannot be sharded.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = _data_parallel(mesh)
    source: nn.Module | None = None
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            source = build()
            _check(source)
            message[1] = _skeleton(source)
        except Exception as error:  # whatever it is, the other processes wait for a word
            message[0] = error if isinstance(error, AdapterError) else AdapterError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(message)
    failure, model = message
    if failure is not None:
        raise failure
    for group in (*_repeated_blocks(model), model):
        # The root too gives its parameters back after each pass, so that hooks always find the shards.
        fully_shard(group, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=mesh.device_type if mesh.device_type == "cpu" else torch.cuda.current_device())
    _fill(model, source)
    for module in model.modules():
        if isinstance(module, AdapterModule):
            module.sharded = True
    return model


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    others = {n: mesh[n].size() for n in mesh.mesh_dim_names or () if n != "data_parallel" and mesh[n].size() > 1}
    if others:
        raise AdapterError(
            f"adapted models are sharded over data-parallel processes only, and {others} was asked for: give "
            "ModelParallelStrategy data_parallel_size=<number of processes> and tensor_parallel_size=1"
        )
    return mesh["data_parallel"]


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise AdapterError(
                f"{name!r} is a single number, which FSDP2 cannot shard (LoRAN learns one with function='sine'); use "
                "another function, or the strategy ddp"
            )
        if not parameter.is_floating_point():
            raise AdapterError(f"{name!r} is quantised, which has not been made to work with FSDP2; use strategy ddp")
    for name, module in model.named_modules():
        if getattr(module, "cache_weight", False):
            raise AdapterError(f"cache_weight of {name!r} would keep whole weights in every process; set it to false")


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a value."""
    empty: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    empty |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of all lists of modules of one class with parameters; of lists within lists, the outermost."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        members = list(module.children())
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(members) > 1 and module not in inside
        if listed and len({type(m) for m in members}) == 1 and all(any(True for _ in m.parameters()) for m in members):
            blocks += members
            inside |= set(module.modules())
    return blocks


@torch.no_grad()
def _fill(model: nn.Module, source: nn.Module | None) -> None:
    """Give every process its part of the tensors of `source`, which the first one has."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    def tensors(of: nn.Module) -> dict[str, Tensor]:
        return dict(of.named_parameters()) | dict(of.named_buffers())

    values = {} if source is None else tensors(source)
    for name, target in tensors(model).items():
        if isinstance(target, DTensor):
            value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if values:
                value.copy_(values[name])
            target.to_local().copy_(distribute_tensor(value, target.device_mesh, target.placements).to_local())
        else:
            if values:
                target.copy_(values[name])
            dist.broadcast(target, src=0)
