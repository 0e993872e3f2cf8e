"""What a training step takes in memory and arithmetic, found without weights, data or the device it will run on.

The model is built without values, and one step after another is traced with fake tensors, which have shapes and no
memory. Each storage counts from the operation that makes it to its last reference, so that what autograd saves, what
adapters keep between steps and what an operation needs for a moment are all in the peak.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lit_adapters.model.attach import adapters
from lit_adapters.model.sharding import repeated_blocks
from lit_adapters.model.unfinished import leave_the_end_to_others
from lit_adapters.ops.cache import keeping_in_modes

WEIGHTS, TRAINED = "weights", "trained parameters"
GRADIENTS, OPTIMIZER, KEPT = "gradients", "optimiser", "copies that adapters keep"
ACTIVATIONS, LOGITS, TEMPORARY = "activations", "logits", "temporary"
CACHE = "keys and values"


@dataclass(frozen=True)
class Example:
    """A training step that can be traced.

    Attributes:
        build: Makes the adapted model; it is called on the meta device, so that no values are computed.
        loss: The loss of the model for a batch of the usual size, made up.
        rows: Rows of the batch.
        items: Tokens or images of the batch.
        unit: What they are.
        outputs: Size of the last dimension of logits.
        packed: Whether the frozen weights of linear layers, but for the head, will be in 4 bits.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    rows: int
    items: int
    unit: str
    outputs: int
    packed: bool = False


@dataclass(frozen=True)
class Operation:
    """Operations of one kind in a step.

    Attributes:
        flops: Multiplications and additions of matrix products, convolutions and attention.
        moved: Bytes of inputs and outputs.
        dtype: In which it computes.
    """

    flops: int
    moved: int
    dtype: torch.dtype


@dataclass
class StepCost:
    """What a step takes.

    Attributes:
        parts: Bytes at the peak, by part.
        operations: Of the forward and backward pass of a batch, in order.
        update: Of the optimiser.
        largest_block: Bytes of the parameters of the largest of the repeated blocks.
        rest: Bytes of the parameters outside the blocks.
        trained_block: Bytes of the trained parameters of the block that has most of them.
        trained_rest: Bytes of the trained parameters outside the blocks.
        buffers: Bytes of the buffers, a part of the weights.
    """

    parts: dict[str, int]
    operations: list[Operation] = field(repr=False)
    update: list[Operation] = field(repr=False)
    largest_block: int
    rest: int
    trained_block: int
    trained_rest: int
    buffers: int

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def flops(self, batches: int = 1) -> int:
        """Floating-point operations of a step that accumulates so many batches."""
        return sum(o.flops for o in [*self.operations * batches, *self.update])

    def moved(self, batches: int = 1) -> int:
        """Bytes that operations of such a step read and write."""
        return sum(o.moved for o in [*self.operations * batches, *self.update])


def step_cost(
    example: Example,
    optimizer: Callable[[nn.Module], Optimizer],
    autocast: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    foreach: bool = False,
    accumulates: bool = False,
) -> StepCost:
    """Trace two training steps and measure the second, which also holds what the first leaves: optimiser states, say.

    Args:
        example: The step.
        optimizer: Makes the optimiser of the model's trainable parameters.
        autocast: In which dtype autocast computes products; None without it.
        weights: The model is cast to this dtype first, as by the Trainer's `bf16-true`.
        foreach: Whether the optimiser takes all parameters at once where it may choose, as torch's do on GPUs.
        accumulates: Whether a step has several batches. All but the first find the gradients of those before, beside
            what they compute themselves; a second batch is traced for its memory.

    Returns:
        What the second step takes. Attention is the CPU's fused kernel, which keeps queries, keys, values and outputs,
        as the fused kernels of GPUs do.
    """
    with torch.device("meta"):
        model = example.build()
        if weights is not None:
            model.to(weights)
    traced = [adapter for _, adapter in adapters(model)]
    leave_the_end_to_others(traced)  # nothing is trained here
    for adapter in traced:
        adapter.assume_calibrated()
    mode = FakeTensorMode()
    _give_shapes(model, mode)
    with mode, keeping_in_modes():
        recorder = _Recorder(example.outputs)
        for tensor in [*model.parameters(), *model.buffers()]:
            recorder.add(tensor, TRAINED if tensor.requires_grad else WEIGHTS)
        stepping = optimizer(model)
        for group in stepping.param_groups:
            if foreach and "foreach" in group and group["foreach"] is None:
                group["foreach"] = True
        with recorder:
            for _ in range(2):
                recorder.begin()
                _step(model, example, stepping, autocast, recorder, accumulates)
    parts = dict(recorder.at_peak)
    if example.packed:
        saved, largest = _packed(model)
        parts[WEIGHTS] -= saved
        parts[TEMPORARY] = parts.get(TEMPORARY, 0) + largest  # one weight at a time is unpacked
    modules = [*repeated_blocks(model), model]
    *blocks, whole = (sum(map(_bytes, module.parameters())) for module in modules)
    *learned, all_learned = (sum(_bytes(p) for p in m.parameters() if p.requires_grad) for m in modules)
    operations: dict[bool, list[Operation]] = {True: [], False: []}
    for phase, operation in recorder.operations:
        operations[phase == OPTIMIZER].append(operation)
    return StepCost(
        parts,
        operations[False],
        operations[True],
        largest_block=max(blocks, default=0),
        rest=whole - sum(blocks),
        trained_block=max(learned, default=0),
        trained_rest=all_learned - sum(learned),
        buffers=sum(map(_bytes, model.buffers())),
    )


_tracing: ContextVar[_Recorder | None] = ContextVar("_tracing", default=None)


def repeated(count: int) -> Iterator[int]:
    """The numbers below `count`, for the passes of a loop that differ in the length of what they read.

    A trace runs two of the passes. The operations of the middle one count for all. Of the last one only the memory
    counts.
    """
    recorder = _tracing.get()
    if recorder is None or count < 2:
        yield from range(count)
        return
    for number, times in (((count - 1) // 2, count), (count - 1, 0)):
        recorder.times = times
        yield number
    recorder.times = 1


@contextmanager
def left_out() -> Iterator[None]:
    """In a trace, operations inside the block do not count: the program that is traced does not do them."""
    recorder = _tracing.get()
    times = 1 if recorder is None else recorder.times
    try:
        if recorder is not None:
            recorder.times = 0
        yield
    finally:
        if recorder is not None:
            recorder.times = times


def count_as(part: str, tensors: Iterable[Tensor]) -> None:
    """In a trace, count the memory of these tensors as another part than that of the phase in which they came up."""
    recorder = _tracing.get()
    if recorder is not None:
        for tensor in tensors:
            recorder.rename(tensor, part)


_PACKED_BYTES = 0.5 + (1 + 4 / 256) / 64  # of a number: 4 bits; a scale of 8 bits for 64, and one of 32 for 256 scales


def _packed(model: nn.Module) -> tuple[int, int]:
    """Bytes that packing saves, and those of the largest packed weight."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = {id(m.weight) for m in model.modules() if m is head or isinstance(m, nn.Embedding)}
    # Adapters hold the weight of their base under its own name.
    candidates = (module._parameters.get("weight") for module in model.modules())
    weights = {
        id(w): w for w in candidates if w is not None and w.dim() == 2 and not w.requires_grad and id(w) not in whole
    }
    sizes = [(_bytes(w), w.numel()) for w in weights.values()]
    return sum(size - int(count * _PACKED_BYTES) for size, count in sizes), max((size for size, _ in sizes), default=0)


def _step(
    model: nn.Module, example: Example, optimizer: Optimizer, autocast: Any, recorder: _Recorder, accumulates: bool
) -> None:
    """Forward, backward and optimiser in the order of Lightning, where gradients live until the next backward pass."""
    _batch(model, example, optimizer, autocast, recorder)
    if accumulates:
        counted = len(recorder.operations)
        _batch(model, example, None, autocast, recorder)
        del recorder.operations[counted:]
    recorder.phase = OPTIMIZER
    optimizer.step()
    recorder.rename_rest(ACTIVATIONS, KEPT)


def _batch(model: nn.Module, example: Example, zeroed: Optimizer | None, autocast: Any, recorder: _Recorder) -> None:
    """Forward and backward; between them the gradients of `zeroed` are forgotten."""
    recorder.phase = ACTIVATIONS
    token = _tracing.set(recorder)
    try:
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            loss = example.loss(model)
    finally:
        _tracing.reset(token)
    recorder.phase = TEMPORARY
    if zeroed is not None:
        zeroed.zero_grad()
    loss.backward()
    del loss
    for parameter in model.parameters():
        if parameter.grad is not None:
            recorder.rename(parameter.grad, GRADIENTS)


aten = torch.ops.aten
# Do not read what they change.
_FILLING = ("copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_", "exponential_")
_ONLY_WRITE = {getattr(aten, name) for name in (*_FILLING, "_foreach_copy_", "_foreach_zero_")}
_FREE = (aten._unsafe_view.default, aten.lift_fresh.default)  # move nothing, and do not say so
# The CPU's fused attention, which torch does not count: products, and where queries stand among the arguments.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (2, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (5, 1),
}


class _Recorder(TorchDispatchMode):
    """Adds up storages that are alive, and what operations compute."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.phase = WEIGHTS
        self.alive: dict[int, tuple[str, int]] = {}
        self.now: Counter[str] = Counter()
        self.came = 0  # storages so far
        self.born: dict[int, int] = {}  # how many there were with this one, of those alive
        self.at_peak: dict[str, int] = {}
        self.peak_at = 0  # storages so far, at the peak
        self.operations: list[tuple[str, Operation]] = []
        self.begun = 0
        self.times = 1  # how often an operation counts

    def begin(self) -> None:
        """Begin a step: forget the peak and the operations of the last."""
        self.at_peak, self.peak_at, self.operations = {}, 0, []
        self.begun += 1

    def add(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage from now on, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        if part is None:
            wide = self.phase != OPTIMIZER and tensor.dim() > 1 and tensor.shape[-1] == self.outputs
            part = LOGITS if wide else self.phase
        self.came += 1
        self.born[key] = self.came
        self.alive[key] = part, storage.nbytes()
        self.now[part] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self.now.total() > sum(self.at_peak.values()):
            self.at_peak, self.peak_at = dict(self.now), self.came

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a storage that is known as another part."""
        self._rename(tensor.untyped_storage()._cdata, part)

    def rename_rest(self, part: str, other: str) -> None:
        """Count all that is alive of a part as another one."""
        for key in [key for key, (known, _) in self.alive.items() if known == part]:
            self._rename(key, other)

    def _rename(self, key: int, part: str) -> None:
        known, size = self.alive[key]
        counts: list[dict[str, int]] = [self.now]
        if self.born[key] <= self.peak_at:
            counts.append(self.at_peak)
        for count in counts:
            count[known] = count.get(known, 0) - size
            count[part] = count.get(part, 0) + size
        self.alive[key] = part, size

    def _forget(self, key: int) -> None:
        part, size = self.alive.pop(key)
        del self.born[key]
        self.now[part] -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it takes."""
        if function is aten._local_scalar_dense.default:
            # Checks ask whether all is well, optimisers how many steps they took: before or after they count this one.
            return args[0].dtype == torch.bool or self.begun - 0.5
        result = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        for tensor in outputs:
            self.add(tensor)
        changed = _changed(function, args, kwargs or {})
        if function.is_view or function in _FREE or not (outputs or changed):
            return result
        moved = sum(_bytes(t) for t in inputs if function is not aten.embedding.default)
        if function._overloadpacket not in _ONLY_WRITE:
            moved += sum(map(_bytes, changed))
        moved += sum(_bytes(t) for t in outputs if t.untyped_storage()._cdata not in known)
        if function is aten.embedding.default:
            moved *= 2  # it reads the rows that it writes
        flops = _flops(function, args, kwargs or {}, result)
        self.operations += [(self.phase, Operation(flops, moved, (outputs or changed)[0].dtype))] * self.times
        return result


def _changed(function: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to, alone or in lists."""
    arguments = function._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in tree_leaves(written) if isinstance(tensor, Tensor)]


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiplications and additions of an operation; 0 for what has no products."""
    if function in _ATTENTION:
        # Two products of queries, keys and values forward; five backward, where one of them is formed again.
        products, first = _ATTENTION[function]
        query, key = args[first], args[first + 1]
        return products * 2 * query.numel() * key.shape[-2]
    count = flop_registry.get(function._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _give_shapes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a model on the meta device by fake ones on the CPU; what is shared stays shared."""
    memory: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        with mode:
            if storage._cdata not in memory:
                count = storage.nbytes() // tensor.element_size()
                memory[storage._cdata] = torch.empty(count, dtype=tensor.dtype, device="cpu")
            view = memory[storage._cdata].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = fake(tensor)
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]
