"""Runs an adapted model in particular ways: without its adapters, to check them, or to measure their inputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.model.gradients import measuring_gradients
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.record import adapters
from lit_adapters.model.unfinished import note_progress
from lit_adapters.ops.statistics import regular_sample

# How many blocks of `disabled` are open, and whether the adapter was enabled before the first; they may overlap.
_open_blocks: weakref.WeakKeyDictionary[AdapterModule, tuple[int, bool]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_VALUES_PER_CALL = 1 << 14  # inputs of an adapter that `calibrate` keeps from one call


def _require_adapters(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    found = list(adapters(model))
    if not found:
        raise AdapterError(f"{type(model).__name__} has no adapters; call lit_adapters.attach(model, ...) first")
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model computes the pretrained function bit for bit, except for modules of `train`.

    Running statistics of the base, which training moves, stay as they are. The model is without adapters for all
    threads, until the last block that began has ended.

    Raises:
        AdapterError: The model has no adapters, or they are merged.
    """
    found = _require_adapters(model)
    merged = [name for name, adapter in found if adapter.merged]
    if merged:
        raise AdapterError(f"{merged[0]!r} is merged into its weight; call lit_adapters.unmerge(model) first")
    with _lock:
        for _, adapter in found:
            blocks, outside = _open_blocks.get(adapter, (0, adapter.enabled))
            _open_blocks[adapter] = blocks + 1, outside
            adapter.enabled = False
    try:
        yield
    finally:
        with _lock:
            for _, adapter in found:
                blocks, outside = _open_blocks.pop(adapter)
                if blocks > 1:
                    _open_blocks[adapter] = blocks - 1, outside
                else:
                    adapter.enabled = outside


@contextmanager
def _recording_inputs(found: list[tuple[str, AdapterModule]], observe: Any) -> Iterator[None]:
    """Inside the block, call observe(name, input) before each adapter's forward."""

    def hook_for(name: str) -> Any:
        return lambda module, args, kwargs: observe(name, args[0] if args else next(iter(kwargs.values())))

    handles = [a.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, a in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recording_calls(found: list[tuple[str, AdapterModule]], notice: Any) -> Iterator[None]:
    """Inside the block, call notice(name) at each adapter's forward.

    Without a hook, as hooks turn off PyTorch's fused encoder layers.
    """
    instance_forwards = [adapter.__dict__.get("forward") for _, adapter in found]

    def recording(name: str, forward: Any) -> Any:
        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            notice(name)
            return forward(*args, **kwargs)

        return recorded_forward

    for name, adapter in found:
        adapter.__dict__["forward"] = recording(name, adapter.forward)
        adapter.on_read = partial(notice, name)
    try:
        yield
    finally:
        for (_, adapter), forward in zip(found, instance_forwards, strict=True):
            adapter.on_read = None
            del adapter.__dict__["forward"]
            if forward is not None:
                adapter.__dict__["forward"] = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Afterwards every module has its own mode again, and cached values are dropped."""
    modes = {module: module.training for module in model.modules()}
    modes |= {module.base: module.base.training for module in model.modules() if isinstance(module, AdapterModule)}
    if any(modes.values()):  # otherwise cached values stay valid
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if training and isinstance(module, AdapterModule):
                module.clear_caches()


def verify(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Run `model(*inputs, **kwargs)` once in eval mode and check that every adapter took part.

    Raises:
        AdapterError: An adapter did not run. Code that reads `layer.weight` instead of calling the layer, or a fused
            MLP, silently bypasses adapters.
    """
    found = _require_adapters(model)
    ran: set[str] = set()
    with torch.no_grad(), evaluating(model), _recording_calls(found, ran.add):
        model(*inputs, **kwargs)
    idle = [f"{name} ({type(adapter.base).__name__})" for name, adapter in found if name not in ran]
    if idle:
        raise AdapterError(
            f"{len(idle)} of {len(found)} adapters did not run: {', '.join(idle[:6])}. The model bypasses these "
            "layers (it reads their weights directly, fuses them, or routed nothing to them); exclude them or turn the "
            "fusion off"
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> None:
    """Run batches through the model before training, so that adapters can measure their inputs.

    NoRA and GroupAffine measure the density of their inputs, NoRA with fit_range="calibrate" also their range for its
    fit. LoRA and DoRA with start="eva" measure the directions of their inputs, and with start="lora_ga" the gradient of
    their weight. NestedLoRA with init="awsvd" measures the sizes of its inputs. Others measure nothing.

    Args:
        model: An adapted model.
        batches: Inputs for `model`: tensors, tuples of positional arguments or dictionaries of keyword arguments. One
            or a few batches of training data are enough.
        run: Passes one batch, of any type and not yet on the model's device, through `model`. By default the batch is
            moved to the device, and `model` is called with it.
        loss: Passes one batch through `model` and returns the loss, a tensor with one number. Only start="lora_ga"
            needs it; it takes the place of `run` then.

    Raises:
        AdapterError: There are no batches or no adapters, a weight is on the meta device, training has begun, a layer's
            inputs are constant or not finite, or an adapter needs `loss` and there is none.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise AdapterError("calibrate takes an iterable of batches; put a single batch into a list: [batch]")
    found = [(n, a) for n, a in _require_adapters(model) if a.calibrates]
    by_gradient = [(n, a) for n, a in found if isinstance(a, WeightAdapter) and a.needs_gradient]
    by_input = [(n, a) for n, a in found if not a.needs_gradient]
    require_loaded(model, "calibrating")
    for _, adapter in found:
        adapter.begin_calibration()
    if by_gradient and loss is None:
        raise AdapterError(
            f"{by_gradient[0][0]!r} starts from the gradient of its weight; give calibrate the loss of a batch: "
            "lit_adapters.calibrate(model, batches, loss=lambda batch: ...)"
        )
    samples: dict[str, list[Tensor]] = {name: [] for name, _ in by_input}
    measuring = dict(by_input)

    @torch.no_grad()
    def observe(name: str, x: Tensor) -> None:
        measuring[name].measure_input(x)
        samples[name].append(regular_sample(x, _VALUES_PER_CALL).float().cpu())

    run = run or partial(call, model)
    passes = measuring_gradients(model, by_gradient) if by_gradient else torch.no_grad()
    with evaluating(model), _recording_inputs(by_input, observe), passes:
        for batch in tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=None):
            if by_gradient and loss is not None:
                loss(batch).backward()  # type: ignore[no-untyped-call]
            else:
                run(batch)
    unseen = [name for name, values in samples.items() if not values]
    if unseen:
        raise AdapterError(f"no input reached {unseen[0]!r}; give at least one batch that passes through every adapter")
    for name, adapter in found:
        adapter.calibrate(torch.cat(samples[name]) if name in samples else torch.empty(0))


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch: a tensor, positional arguments or keyword arguments, moved to its device."""
    batch = _to(batch, next(model.parameters()).device)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def set_progress(model: nn.Module, progress: float) -> None:
    """Set every annealed adapter to where its schedule is at `progress`; at 1 most schedules have become linear.

    Args:
        model: A module with adapters; if none of them is annealed, nothing changes.
        progress: The share of the optimiser steps that are done, in [0, 1].

    Raises:
        AdapterError: The model has no adapters, an annealed one is merged, or `progress` is outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise AdapterError(f"progress {progress} must lie in [0, 1]")
    found = _require_adapters(model)
    for name, adapter in found:
        if adapter.merged and adapter.schedule is not None:
            raise AdapterError(f"{name!r} is merged at its linear end; call lit_adapters.unmerge(model) first")
        adapter.set_progress(progress)
    note_progress((adapter for _, adapter in found), progress)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    return tuple(_to(v, device) for v in batch) if isinstance(batch, (tuple, list)) else batch
