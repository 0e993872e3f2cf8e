"""The module that an adapter method puts around a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_adapters.errors import AdapterError
from lit_adapters.methods.allocation import Allocation
from lit_adapters.methods.copies import CopiedBuffers
from lit_adapters.methods.description import Describing
from lit_adapters.methods.hooks import copy_hooks, move_hooks
from lit_adapters.methods.merging import Merging
from lit_adapters.methods.rewritten import KeptParameters
from lit_adapters.ops._context import refuse_symbols, transformed, unscriptable
from lit_adapters.ops.cache import Cache
from lit_adapters.schedules import Schedule


class AdapterModule(KeptParameters, CopiedBuffers, Merging, Describing):
    """A layer with an adapter: the base layer's parameters under their own names, the adapter's beside them.

    The base module stands outside the module tree. Once adopted it shares this module's tables of parameters, buffers
    and children: keys keep their names, and moving, loading or sharding this module moves, loads or shards the base.
    Until then the base is untouched, so that `attach` can build all adapters first and change the model only if every
    one of them could be built.

    Subclasses register their tensors with `add_parameter` and `add_buffer`: these stay in float32 whatever dtype the
    model is cast to, and are what `adapter_parameters` and the adapter files hold.

    Args:
        base: The layer that is adapted.
        qualified_name: Its name in the model, for messages and reports.

    Attributes:
        method: Name of the method, as in reports, tags and `lr_scale`.
        decays: Whether weight decay makes sense for the parameters.
        schedule: Of what is annealed while training; None if nothing is.
        allocation: How the training gives up directions of this layer's update, shared by the layers of the method;
            None if it gives up none.
        cache_while_training: Whether `may_cache` also allows caching in training. Values of frozen tensors alone, such
            as a cast W0, are cached without asking.
        has_branch: Whether the layer's output is that of the base plus `branch` of the input.
        sharded: Whether the parameters are spread over processes, and whole only while the layer runs.
        read_as_weight: Whether the parent multiplies by this layer's `weight` itself and never calls the layer.
        on_read: Called at every such reading, if it is set.
        enabled: False makes `forward` return what the pretrained layer returns.
    """

    method: ClassVar[str]
    decays: ClassVar[bool] = True
    schedule: Schedule | None = None
    allocation: Allocation | None = None
    cache_while_training = False
    has_branch = False
    sharded = False
    read_as_weight = False
    on_read: Callable[[], object] | None = None
    base: Any  # an nn.Module; Any, because each kind of layer has its own `weight` and `bias`

    def __init__(self, base: nn.Module, qualified_name: str) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self._base_parameters, self._base_buffers = list(base._parameters), list(base._buffers)
        self._parameters.update(base._parameters)
        self._buffers.update(base._buffers)
        self._non_persistent_buffers_set |= base._non_persistent_buffers_set
        self._modules.update(base._modules)
        # Mirror the base's plain attributes (in_features ...) for code that reads them, but not names that we define,
        # such as a `forward` that a library has put on the layer.
        own = set(dir(self))
        self.__dict__.update({k: v for k, v in vars(base).items() if k[0] != "_" and k not in own})
        self._adapter_parameters: list[str] = []
        self._adapter_buffers: list[str] = []
        self._recomputed_buffers: list[str] = []
        self._merged_names = []
        self.enabled = True
        self.qualified_name = qualified_name
        self.__dict__["training"] = base.training

    # ---- tensors

    def adopt(self) -> None:
        """Let the base share this module's tables from now on, and take over its hooks."""
        base = self.base
        self._modules.update(base._modules)  # where attach has put adapters around children of an adapted block
        base._parameters, base._buffers, base._modules = self._parameters, self._buffers, self._modules
        move_hooks(base, self)

    def stand_beside(self) -> None:
        """Hold the adapter's own tensors alone, in place of `adopt`: the base stands elsewhere in the tree."""
        for table in (self._parameters, self._buffers, self._modules):
            for name in set(table) - {*self._adapter_parameters, *self._adapter_buffers, *self._recomputed_buffers}:
                del table[name]
        self._base_parameters, self._base_buffers = [], []

    def add_parameter(self, name: str, value: Tensor) -> None:
        """Register an adapter parameter; float32."""
        self._adapter_parameters.append(name)
        self.register_parameter(name, nn.Parameter(value.float()))

    def add_buffer(self, name: str, value: Tensor, persistent: bool = True) -> None:
        """Register an adapter buffer; float32 where it is floating, whatever the default dtype.

        A buffer that is not persistent can be computed again, and is in no state dict and no adapter file.
        """
        (self._adapter_buffers if persistent else self._recomputed_buffers).append(name)
        self.register_buffer(name, value.float() if value.is_floating_point() else value, persistent)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this adapter trains, by local name."""
        return {name: getattr(self, name) for name in self._adapter_parameters}

    def adapts(self) -> list[nn.Parameter]:
        """The base's parameters that this adapter goes around; those of the model that no adapter does are reported."""
        return list(self.pretrained().parameters())

    def method_of(self, name: str) -> str:
        """The method that an adapter parameter belongs to, by its local name; in `lr_scale` and reports."""
        return self.method

    @property
    def needs_whole(self) -> str:
        """Why a training of this adapter must not shard it, with what to do instead; empty if it may."""
        return "" if self.allocation is None else self.allocation.needs_whole

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Those of this adapter's parameters that other layers compute with too, by local name; by default none."""
        return {}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of this adapter, by local name: what an adapter file keeps."""
        self.restore_averaged()
        return {name: getattr(self, name) for name in (*self._adapter_parameters, *self._adapter_buffers)}

    def adapter_buffers(self) -> dict[str, Tensor]:
        """All buffers of this adapter, by local name; those that no file holds, too."""
        names = (*self._adapter_buffers, *self._recomputed_buffers)
        return {name: buffer for name in names if (buffer := self._buffers[name]) is not None}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The parameters for which weight decay makes no sense."""
        return [] if self.decays else list(self.adapter_parameters().values())

    def reset_parameters(self) -> None:
        """Give every tensor of this adapter its starting value, also after `to_empty`."""

    def recompute_buffers(self) -> None:
        """Compute the buffers that no file holds (`persistent=False`); called when they have left the meta device."""

    # ---- forward

    def branch(self, x: Tensor) -> Tensor:
        """What this adapter adds to the output of the base for an input x, where it `has_branch`."""
        raise AdapterError(f"{type(self).__name__} has no branch")

    @property
    def merged(self) -> bool:
        """Whether the layer computes with merged parameters at present."""
        return bool(self._merged_names)

    @property
    def in_effect(self) -> bool:
        """Whether `forward` must apply the adapter: it is enabled, and not merged into the base's parameters.

        Raises:
            AdapterError: torch.fx.symbolic_trace traces the model.
        """
        refuse_symbols(self.qualified_name)
        if self._original is not None:
            self.begin_forward()
        return self.enabled and not self.merged

    def unadapted(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns while the adapter is not `in_effect`: with the pretrained or the merged parameters."""
        if not self.merged:
            return self.base(*args, **kwargs)
        return self.call_base_with({name: getattr(self, f"merged_{name}") for name in self._merged_names}, args, kwargs)

    def call_base_with(self, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the base returns with other values of some of its own parameters, by local name."""
        attributes = self.base.__dict__
        if not torch.jit.is_tracing():
            # A forward of the instance (accelerate's, say) or a compiled one is bound to the base and reads its table.
            bound = "forward" in attributes or attributes.get("_compiled_call_impl") is not None
            if bound or torch.compiler.is_compiling():
                return functional_call(self.base, dict(parameters), args, kwargs)
            # A twin with a table of its own: functional_call changes that of the base, which other threads read.
            twin = object.__new__(type(self.base))
            twin.__dict__.update(attributes, _parameters={**self.base._parameters, **parameters})
            result = twin(*args, **kwargs)
            for name, value in twin.__dict__.items():
                if name != "_parameters" and attributes.get(name) is not value:
                    attributes[name] = value  # what the forward has noted on itself
            return result
        # PyTorch refuses functional_call while it traces. An attribute of an instance hides a parameter of its name.
        attributes.update(parameters)
        try:
            return self.base(*args, **kwargs)
        finally:
            for name in parameters:
                del attributes[name]

    def __prepare_scriptable__(self) -> AdapterModule:
        """Called by torch.jit.script, which would fail at the first annotation.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(unscriptable(self.qualified_name))

    # ---- values that are computed once

    def may_cache(self) -> bool:
        """Whether a value computed from trained tensors may be cached now.

        Never under torch.compile or torch.func; in training with `cache_while_training` alone; in eval mode if there
        are no gradients and the parameters are not sharded.
        """
        if torch.compiler.is_compiling() or transformed():
            return False
        if self.training:
            return self.cache_while_training
        return not torch.is_grad_enabled() and not self.sharded

    def clear_caches(self) -> None:
        """Drop every cached value; needed after a change that does not raise `tensor._version`, such as by `.data`."""
        for value in vars(self).values():
            if isinstance(value, Cache):
                value.clear()

    # ---- training

    def set_progress(self, progress: float) -> None:
        """Move what is annealed to training progress in [0, 1]; most methods anneal nothing."""

    @property
    def awaits_calibration(self) -> bool:
        """Whether `calibrate` must run before training."""
        return False

    def assume_calibrated(self) -> None:
        """Train without calibration: for models without values, from which nothing is learned."""
        self._awaits_calibration = False

    @property
    def calibrates(self) -> bool:
        """Whether `lit_adapters.calibrate` shows this adapter its inputs, and calls `calibrate`."""
        return type(self).calibrate is not AdapterModule.calibrate

    @property
    def needs_gradient(self) -> bool:
        """Whether `lit_adapters.calibrate` computes the gradient of the pretrained weight for `measure_gradient`."""
        return False

    def begin_calibration(self) -> None:
        """Called before the passes of a calibration: forget earlier measurements, and check that it makes sense.

        Raises:
            AdapterError: Training has begun, or the adapter cannot be calibrated in this form.
        """

    def measure_input(self, x: Tensor) -> None:
        """Take what `calibrate` will need of one whole input of this layer; called for every input of a calibration."""

    def measure_gradient(self, gradient: Tensor) -> None:
        """Take the gradient of W0 (out, in), float32 on the CPU, summed over the batches of a calibration."""

    def calibrate(self, values: Tensor) -> None:
        """Fit to a sample (N,) of this layer's own inputs, before training. Most methods need nothing.

        Raises:
            AdapterError: Training has begun, so that calibrating would change the function.
        """

    def kept_directions(self) -> list[bool] | None:
        """Which directions of the update a rank allocation has kept; None if it is not known, or there is none."""
        return None

    def orthogonal_factors(self) -> list[tuple[nn.Parameter, bool]]:
        """The matrices that the penalty of `allocation` keeps orthogonal: True is for their rows, False for columns."""
        return []

    def calibrated_tensors(self) -> dict[str, Tensor]:
        """What `calibrate` may write, by local name: by default the buffers. All processes take the first one's."""
        return dict(self.named_buffers(recurse=False))

    # ---- the base by itself

    def unwrapped(self) -> nn.Module:
        """The base module, with its own parameter tables and hooks again. The adapter is given up."""
        return self.take_out()

    def take_out(self) -> nn.Module:
        """As `unwrapped`, but this adapter may `adopt` the base again after `rejoin`."""
        self.clear_caches()  # it may wait long for its next use
        move_hooks(self, self.base)
        return self._own_tables(self.base)

    def rejoin(self, device: torch.device | None) -> None:
        """Follow what happened to the base while this adapter was out: other tensors, a device, or a mode.

        Args:
            device: Where the adapter's own tensors go; None leaves them.
        """
        base = self.pretrained()
        self._parameters.update({name: base._parameters[name] for name in self._base_parameters})
        self._buffers.update({name: base._buffers[name] for name in self._base_buffers})
        self._modules.update(base._modules)
        self.training = base.training
        if device is not None:
            for tensor in (getattr(self, name) for name in (*self._adapter_parameters, *self._adapter_buffers)):
                if tensor.device != device:
                    tensor.data = tensor.data.to(device)
            for name in self._recomputed_buffers:  # other objects, as other adapters may hold the same
                self._buffers[name] = self._buffers[name].to(device)  # type: ignore[union-attr]
        self.clear_caches()
        self.note_tensors()

    def pretrained(self) -> nn.Module:
        """The module whose place the adapter takes."""
        base: nn.Module = self.base
        return base

    def base_copy(self) -> nn.Module:
        """A second module that computes what the base does, on the same parameters, free of the adapter."""
        base = copy.copy(self.base)
        copy_hooks(self.base, base)  # `copy.copy` shares the tables
        return self._own_tables(base)

    def _own_tables(self, base: nn.Module) -> nn.Module:
        base._parameters = {n: self._parameters[n] for n in self._base_parameters}
        base._buffers = {n: self._buffers[n] for n in self._base_buffers}
        base._modules = dict(self._modules)
        base.training = self.training
        return base

    # ---- what nn.Module does with modules

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and "base" in self.__dict__:  # `train` sets it, and Lightning after each validation
            self.base.training = value
            if value != self.training:
                self.clear_caches()
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> AdapterModule:
        self.restore_averaged()
        self.clear_caches()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterModule:
        """Move adapter tensors with the model, but keep their dtype."""
        self.clear_caches()
        were_meta = self._meta_buffers()
        own = {id(t) for t in self.adapter_tensors().values()} | {
            id(self._buffers[n]) for n in self._recomputed_buffers
        }
        own |= {id(p.grad) for p in self.adapter_parameters().values() if p.grad is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in own or moved.dtype == tensor.dtype:
                return moved
            return torch.empty_like(tensor, device=moved.device) if tensor.is_meta else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        if were_meta and not self._meta_buffers():
            self.recompute_buffers()
        self.note_tensors()
        return self

    def _meta_buffers(self) -> list[str]:
        return [name for name in self._recomputed_buffers if self._buffers[name].is_meta]  # type: ignore[union-attr]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise AdapterError(f"{self.qualified_name!r} is merged; call lit_adapters.unmerge(model) before loading")
        self.clear_caches()
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = next((t.device for t in self.adapter_tensors().values() if not t.is_meta), None)
        if device is not None and self._meta_buffers():
            for name in self._meta_buffers():
                self._buffers[name] = torch.empty_like(self._buffers[name], device=device)  # type: ignore[arg-type]
            self.recompute_buffers()
        self.note_tensors()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Let the base layer save the tensors, as a quantised one also saves its scales.

        Base and adapter share their tables, so the tensors of the adapter are among them.
        """
        self.restore_averaged()
        if self.base._parameters is self._parameters:
            self.base._save_to_state_dict(destination, prefix, keep_vars)
            for name in self._non_persistent_buffers_set:
                destination.pop(f"{prefix}{name}", None)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
