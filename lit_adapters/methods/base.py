"""What every adapter method is: a configuration (`Method`) and the module it puts around a layer (`AdapterModule`)."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.description import AdapterSummary, LearnedFunctions, LowRankUpdate, functions_summary
from lit_adapters.methods.placeholder import plain_layers
from lit_adapters.schedules import Schedule

Config = Mapping[str, Any]


class Method:
    """Base of the method configurations; each subclass is a dataclass.

    A plain class, because jsonargparse refuses `class_path` for subclasses of a dataclass.
    """

    name: ClassVar[str]  # in reports, tags and lr_scale
    kind: ClassVar[str]  # "linear" or "activation": what "targets" selects among
    merges: ClassVar[str] = "yes"  # whether `merge` folds it into weights, in a few words
    exports: ClassVar[str] = "no"  # whether `export_peft` can write it
    targets: str | Sequence[str]
    exclude: Sequence[str]

    def parts(self) -> list[Method]:
        """The single methods this one is composed of."""
        return [self]

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        """The adapter for one target.

        Raises:
            AdapterError: this layer cannot carry the method; the message names the layer and the fix.
        """
        raise AdapterError(f"{type(self).__name__} is a composition of methods; attach it to a model instead")

    def inject(self, model: nn.Module) -> dict[str, AdapterModule] | None:
        """Adapters by qualified name, from a method that finds its own targets; None lets `targets` decide.

        The model is left as it was: `attach` puts the adapters in.
        """
        return None

    def normalise_targets(self) -> None:
        """Give `targets` and `exclude` one form, so that a method equals its round trip through YAML or JSON."""
        if not isinstance(self.targets, (str, Iterable)):
            raise AdapterError(
                f"targets {self.targets!r} must be a keyword, a regular expression or a list of suffixes"
            )
        if isinstance(self.exclude, str):
            raise AdapterError(f"exclude {self.exclude!r} must be a list of name suffixes: [{self.exclude!r}]")
        self.targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        self.exclude = list(self.exclude)

    def to_config(self) -> dict[str, Any]:
        """The `{class_path, init_args}` form: plain values, as YAML, JSON and hparams hold it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain = {k: v.to_config() if isinstance(v, (Method, Schedule)) else _plain(v) for k, v in values.items()}
        module = type(self).__module__
        module = "lit_adapters" if module.startswith("lit_adapters.") else module
        return {"class_path": f"{module}.{type(self).__qualname__}", "init_args": plain}

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule | None:
        """An adapter around a layer on the meta device, to hold the saved `tensors` where no base model is at hand.

        By default `wrap` is tried on a plain layer of the recorded `shapes`. A method whose tensors tell the sizes of
        their layer overrides this: then its checkpoints, which record no shapes, can be inspected as well.

        Args:
            qualified_name: The layer's name.
            tensors: What the file holds for this layer, by local name; their shapes decide.
            shapes: Shapes of the base layer's own parameters by local name; empty where the file does not tell.

        Returns:
            The adapter, its tensors not yet loaded; None if only the base model could tell how to build it.

        Raises:
            AdapterError: a tensor is missing without which the sizes are not known.
        """
        for layer in plain_layers(self.kind, shapes):
            parent = nn.Module()
            parent.add_module("layer", layer)
            try:
                adapter = self.wrap(layer, qualified_name, parent)
            except AdapterError:
                continue
            own = adapter.adapter_tensors()
            if all(tensors[key].shape == own[key].shape for key in own.keys() & tensors.keys()):
                return adapter
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


def to_methods(methods: Method | Config | Iterable[Method | Config] | None) -> list[Method]:
    """Methods from objects, their `{class_path, init_args}` forms, or a list of either.

    Raises:
        AdapterError: something else was given, or a class path that is not a method.
    """
    if methods is None:
        return []
    if isinstance(methods, (Method, Mapping)):
        methods = [methods]
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise AdapterError(f"adapters must be a Method, its {{class_path, init_args}} or a list, not {methods!r}")
    return [m if isinstance(m, Method) else _from_config(m) for m in methods]


def _from_config(config: Any) -> Method:
    if not isinstance(config, Mapping) or "class_path" not in config:
        raise AdapterError(f"an adapter configuration needs 'class_path' (and 'init_args'), got {config!r}")
    path = str(config["class_path"])
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module or "lit_adapters"), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"no adapter method {path!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise AdapterError(f"{path!r} is not an adapter method; use one such as 'lit_adapters.NoRA'")
    try:
        return cls(**dict(config.get("init_args") or {}))
    except TypeError as error:
        raise AdapterError(f"{path}: {error}") from error


class AdapterModule(nn.Module):
    """A layer with an adapter: the base layer's parameters under their own names, the adapter's beside them.

    The base module itself is kept outside the module tree but, once adopted, looks parameters and buffers up in this
    module's own tables, so that moving, loading or sharding this module is seen by it at once, and keys do not change.

    Subclasses register their tensors with `add_parameter` and `add_buffer`: these stay in float32 whatever dtype the
    model is cast to, and are what `adapter_parameters` and the adapter files hold.
    """

    method: ClassVar[str]
    decays: ClassVar[bool] = True  # whether weight decay makes sense for the parameters
    schedule: Schedule | None = None  # of what is annealed while training
    sharded = False  # whether the parameters are spread over processes, and whole only while the layer runs
    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self._base_parameters, self._base_buffers = list(base._parameters), list(base._buffers)
        self._parameters.update(base._parameters)
        self._buffers.update(base._buffers)
        self._non_persistent_buffers_set |= base._non_persistent_buffers_set
        self._modules.update(base._modules)
        # Sizes and the like, which other code may ask a layer for; not what is the adapter's own, as a `forward` that a
        # library has put on the layer.
        own = set(dir(self))
        self.__dict__.update({k: v for k, v in vars(base).items() if k[0] != "_" and k not in own})
        self._adapter_parameters: list[str] = []
        self._adapter_buffers: list[str] = []
        self._derived_buffers: list[str] = []
        self.enabled = True
        self.qualified_name = ""  # set by attach
        self.training = base.training

    def adopt(self) -> None:
        """Let the base look its tensors up here from now on; until then it is untouched."""
        base = self.base
        base._parameters, base._buffers, base._modules = self._parameters, self._buffers, self._modules

    def add_parameter(self, name: str, value: Tensor) -> None:
        """Register an adapter parameter; float32."""
        self._adapter_parameters.append(name)
        self.register_parameter(name, nn.Parameter(value.float()))

    def add_buffer(self, name: str, value: Tensor, persistent: bool = True) -> None:
        """Register an adapter buffer; float32 where it is floating, whatever the default dtype.

        One that is not persistent can be computed anew, and is in no state dict and no adapter file.
        """
        (self._adapter_buffers if persistent else self._derived_buffers).append(name)
        self.register_buffer(name, value.float() if value.is_floating_point() else value, persistent)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this adapter trains, by local name."""
        return {name: getattr(self, name) for name in self._adapter_parameters}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of this adapter, by local name: what an adapter file keeps."""
        return {name: getattr(self, name) for name in (*self._adapter_parameters, *self._adapter_buffers)}

    def set_progress(self, progress: float) -> None:
        """Move what is annealed to training progress in [0, 1]; most methods have nothing of the kind."""

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The parameters for which weight decay makes no sense."""
        return [] if self.decays else list(self.adapter_parameters().values())

    def statistics(self) -> dict[str, float]:
        """Scalars that say what this adapter has learned; each method says what they mean."""
        return {}

    def singular_values(self) -> dict[str, Tensor]:
        """Spectra of what was learned, descending, by the name of the matrix: "update" for that of a weight."""
        update = self.low_rank_update()
        return {} if update is None else {"update": update.spectrum()[1].cpu()}

    def observe(self, x: Tensor) -> dict[str, float]:
        """Scalars that say what this adapter does to its own input x of the present batch; by default none."""
        return {}

    @property
    def merged(self) -> bool:
        """Whether the adapter's effect is inside the base weight at present."""
        return False

    @property
    def awaits_calibration(self) -> bool:
        """Whether `calibrate` must run before training."""
        return False

    def calibrate(self, values: Tensor) -> None:
        """Fit to a sample (N,) of this layer's own inputs, before training. Most methods need nothing.

        Raises:
            AdapterError: training has begun, so that calibrating would change the function.
        """

    def folded(self) -> nn.Module:
        """A plain module with this adapter's function, for what no weight can absorb; `merge` puts it in its place."""
        raise AdapterError(f"{type(self).__name__} ({self.qualified_name!r}) cannot be merged; detach or keep it")

    def unwrapped(self) -> nn.Module:
        """The base module, with its own parameter tables again."""
        return self._own_tables(self.base)

    def base_copy(self) -> nn.Module:
        """A second module that computes what the base does, on the same parameters, free of the adapter."""
        return self._own_tables(copy.copy(self.base))

    def _own_tables(self, base: nn.Module) -> nn.Module:
        base._parameters = {n: self._parameters[n] for n in self._base_parameters}
        base._buffers = {n: self._buffers[n] for n in self._base_buffers}
        base._modules = dict(self._modules)
        base.training = self.training
        return base

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise AdapterError(f"{self.qualified_name!r} is merged; call lit_adapters.unmerge(model) before loading")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As the base layer does it, which knows what else a quantised weight needs; it shares these tables."""
        if self.base._parameters is self._parameters:
            self.base._save_to_state_dict(destination, prefix, keep_vars)
            for name in self._non_persistent_buffers_set:
                destination.pop(f"{prefix}{name}", None)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def train(self, mode: bool = True) -> AdapterModule:
        self.base.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterModule:
        """Move adapter tensors with the model, but keep their dtype."""
        own = {id(t) for t in self.adapter_tensors().values()} | {id(self._buffers[n]) for n in self._derived_buffers}
        own |= {id(p.grad) for p in self.adapter_parameters().values() if p.grad is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in own or moved.dtype == tensor.dtype:
                return moved
            return torch.empty_like(tensor, device=moved.device) if tensor.is_meta else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    # What the adapter says of itself, from its own tensors: files may hold it without the base model.

    def low_rank_update(self) -> LowRankUpdate | None:
        """The learned update of a weight as its factors; spectra, ranks and comparisons follow from it."""
        return None

    def learned_update(self) -> Tensor | None:
        """What was learned, as one tensor that is zero at the start: the change of a bias or of output scales, say.

        For methods without factors (`low_rank_update`) and functions (`learned_functions`); None if only the base
        model could tell.
        """
        return None

    def learned_functions(self) -> LearnedFunctions | None:
        """This adapter, if what it learns are activation functions: they are drawn, and counted as "functions"."""
        return None

    def summary(self) -> AdapterSummary:
        """What `lit-adapters inspect` shows: by default what follows from the three hooks above, else sizes alone."""
        update, functions = self.low_rank_update(), self.learned_functions()
        if update is not None:
            return update.summary()
        if functions is not None:
            return functions_summary(functions)
        sizes = {name: "x".join(map(str, p.shape)) or "1" for name, p in self.adapter_parameters().items()}
        learned = self.learned_update()
        change = None if learned is None else torch.linalg.vector_norm(learned.detach().double()).item()
        return AdapterSummary(", ".join(f"{name} {size}" for name, size in sizes.items()), change)

    def check_linear(self) -> None:
        """Raise if the layer's parameters could not hold the effect at present; most methods are linear throughout.

        Raises:
            AdapterError: the adapter is annealed, and still nonlinear.
        """

    def merge_obstacle(self) -> str:
        """Why the effect cannot go into the layer's parameters now; empty if it can."""
        try:
            self.check_linear()
        except AdapterError as error:
            return str(error)
        return ""

    def charts(self) -> dict[str, str]:
        """Charts for the page of TensorBoard: the tags of each by its title.

        `each_layer` and `mean_over_layers` of `methods/description.py` give the tags of a statistic, one that
        `statistics` or `observe` returns.
        """
        return {}

    def input_histogram(self, x: Tensor) -> Tensor | None:
        """Counts (D + 2,) of a sample of the inputs x: below the grid of `learned_functions`, in its D parts, above it.

        None, the default, counts nothing.
        """
        return None
