"""Models whose parameters are sharded over processes (FSDP2): sharding them, and gathering parameters again.

    model = shard(build, mesh)        build() makes and adapts the model; it runs in the first process only
    with gathered(adapter): ...       inside the block the adapter's own parameters are whole, in every process

A sharded parameter is a DTensor, recognised by its method `full_tensor`, which every process has to call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other tensor as it is. Every process has to call this."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of `model` is sharded over processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Check that `model` is not sharded.

    Args:
        model: The model.
        what: What needs whole weights, for the message.

    Raises:
        AdapterError: The model is sharded.
    """
    if is_sharded(model):
        raise AdapterError(
            f"{what} needs whole weights, and those of {type(model).__name__} are sharded: call "
            "lit_adapters.save_adapters in every process, then lit_adapters.load_adapters on a model of one process"
        )


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the modules' own parameters are whole and can be read. Every process has to enter it."""
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
    """Build a model and shard every parameter over the processes of `mesh`.

    Each repeated block is one group of FSDP2, and the rest is another. Only the first process builds the model, on the
    CPU. The others get its structure on the meta device, then their shards, one parameter after the other.

    Args:
        build: Makes the model and attaches its adapters.
        mesh: The mesh of Lightning's `ModelParallelStrategy`, or one with one dimension.

    Returns:
        The sharded model.

    Raises:
        AdapterError: `build` failed (raised in every process), the mesh has tensor parallelism, or an adapter cannot be
            sharded.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = _data_parallel(mesh)
    source: nn.Module | None = None
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            source = build()
            check_shardable(source)
            message[1] = _skeleton(source)
        except Exception as error:  # any error, as the other processes are waiting
            message[0] = error if isinstance(error, AdapterError) else AdapterError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(message)
    failure, model = message
    if failure is not None:
        raise failure
    for group in (*repeated_blocks(model), model):
        # The root, too, is resharded after each pass, so that hooks always find the shards.
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


def check_shardable(model: nn.Module) -> None:
    """Check that FSDP2 can shard a model.

    Raises:
        AdapterError: A parameter is a single number, quantised, or shared between blocks.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise AdapterError(
                f"{name!r} is a single number, which FSDP2 cannot shard (LoRAN learns one with function='sine'); use "
                "frequency='calibrate', another function, or the strategy ddp"
            )
        if not parameter.is_floating_point():
            raise AdapterError(f"{name!r} is quantised, which is not supported with FSDP2; use the strategy ddp")
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) and (shared := module.shared_parameters()):
            raise AdapterError(
                f"{name!r} shares {' and '.join(shared)} with other layers, and under FSDP2 a tensor is whole only "
                "while its own block runs; use the strategy ddp, or with DenseLoRA share='none'"
            )
        if getattr(module, "cache_while_training", False):
            raise AdapterError(f"cache_weight of {name!r} would keep whole weights in every process; set it to false")


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, made without copying values."""
    empty: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    empty |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every list of modules of one class with parameters; for nested lists, of the outermost only."""
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
    """Give every process its part of the tensors of `source`, which only the first process has."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    def tensors(module: nn.Module) -> dict[str, Tensor]:
        return dict(module.named_parameters()) | dict(module.named_buffers())

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
