"""What `attach` leaves on a model: the record of it, and the adapters in their places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.matrix_layers import is_quantised, stop_repacking
from lit_adapters.methods.quantised import foreign_quantisation
from lit_adapters.methods.read_weights import reads_weight
from lit_adapters.methods.rewritten import called_by
from lit_adapters.methods.targets import Target, places
from lit_adapters.model.changes import has_changed, samples
from lit_adapters.model.fuse_guard import free_fusing, guard_fusing
from lit_adapters.model.meta import expect_values, forget_expectation
from lit_adapters.model.save_guard import free_saving, guard_saving
from lit_adapters.model.unfinished import leave_the_end_to_others
from lit_adapters.model.watch import forget, watch

_STATE = "_lit_adapters"
SETS = "_lit_adapter_sets"  # attribute of a model with all its adapters, also those that are not in use
DEFAULT = "default"
# Where wrappers of torch hold the model, by the names of their classes.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


@dataclass
class Attachment:
    """The record of an `attach`, kept on the model for saving and for detaching.

    Attributes:
        methods: The methods in the `{class_path, init_args}` form.
        train: As given to `attach`.
        trained_parameters: The names of the base parameters that train.
        buffers: The names of the base's persistent buffers, such as running statistics, which training changes.
        required_grad: `requires_grad` of each base parameter before `attach`.
        prefix: The key prefix of this model in the state dict loaded last, such as "model."; empty for the model
            itself.
        samples: Some values of each frozen base parameter, as they were when they were last loaded or attached.
        unfrozen: Names of frozen base parameters that a loaded adapter file holds, as they trained all the same.
        names: The names of the adapters in use: one, or several that act together.
        by_row: The name of the adapters for each row of a batch, inside a block of `rows`.
    """

    methods: list[dict[str, Any]]
    train: str | list[str]
    trained_parameters: list[str]
    buffers: list[str]
    required_grad: dict[str, bool] = field(default_factory=dict)
    prefix: str = ""
    samples: dict[str, Tensor] = field(default_factory=dict)
    unfrozen: list[str] = field(default_factory=list)
    names: tuple[str, ...] = (DEFAULT,)
    by_row: tuple[str | None, ...] | None = None

    @property
    def is_one(self) -> bool:
        """Whether the adapters of one name act, as they were attached."""
        return len(self.names) == 1 and self.by_row is None


def adapters(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """All adapters of a model as (qualified name, module)."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule):
            yield name, module


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that were given to `attach`, as (qualified name, module): the model itself, or parts of it."""
    for name, module in model.named_modules():
        if _STATE in module.__dict__:
            yield name, module


def inner(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and of data parallelism, as they have names of their own."""
    while (attribute := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def is_in_use(model: nn.Module) -> bool:
    """Whether adapters that were attached to this module itself are in their places."""
    return _STATE in inner(model).__dict__


def attachment(model: nn.Module, several: bool = False) -> Attachment:
    """The record that `attach` left on `model`.

    Args:
        model: The module given to `attach`.
        several: Whether several adapters may be in use together.

    Raises:
        AdapterError: Nothing was attached to this module itself, none of its adapters is in use, or several are.
    """
    model = inner(model)
    state: Attachment | None = model.__dict__.get(_STATE)
    if state is None:
        waiting = model.__dict__.get(SETS)
        if waiting:
            raise AdapterError(f"no adapter is in use: call lit_adapters.use(model, {next(iter(waiting.by_name))!r})")
        inside = next((name for name, _ in attached(model)), None)
        fix = f"give its part {inside!r}, which has them" if inside else "call lit_adapters.attach(model, ...) first"
        raise AdapterError(f"{type(model).__name__} has no adapters of its own; {fix}")
    if not several and state.by_row is not None:
        raise AdapterError("each row of a batch has adapters of its own inside this block of lit_adapters.rows; end it")
    if not several and not state.is_one:
        raise AdapterError(
            f"the adapters {', '.join(map(repr, state.names))} are in use together; choose one of them with "
            f"lit_adapters.use(model, {state.names[0]!r}) first, or make one of them with lit_adapters.combine"
        )
    return state


def put_in(model: nn.Module, state: Attachment, placed: Sequence[tuple[Target, AdapterModule]]) -> None:
    """Put adapters into their places in a model that has none, and freeze all parameters but those that train.

    Args:
        model: The model.
        state: The record to leave on it.
        placed: The adapters, each with its place; one may stand at several.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trained_parameters)
    for module in model.modules():  # also layers without an adapter, as gradients pass through them
        if is_quantised(module):
            stop_repacking(module)
    for target, adapter in placed:
        setattr(target.parent, target.attribute, adapter)
    for adapter in {id(adapter): adapter for _, adapter in placed}.values():
        adapter.adopt()
        if any(t.is_meta for t in adapter.adapter_tensors().values()):
            adapter.register_forward_pre_hook(expect_values, with_kwargs=True)
            if expect_values not in model._forward_pre_hooks.values():  # layers without an adapter may run first
                model.register_forward_pre_hook(expect_values, prepend=True, with_kwargs=True)
    model.__dict__[_STATE] = state
    model.register_load_state_dict_pre_hook(_note_prefix)
    model.register_load_state_dict_post_hook(_forgive_frozen)
    if placed:
        guard_saving(model)
        guard_fusing(model)
    watch(model, dict(adapters(model)))


def released(adapter: AdapterModule) -> nn.Module:
    """The base of an adapter that is given up, without hooks of `attach`."""
    return _without_hooks(adapter.unwrapped())


def taken_out(adapter: AdapterModule) -> nn.Module:
    """The base of an adapter that is to be put in again, without hooks of `attach`."""
    return _without_hooks(adapter.take_out())


def _without_hooks(base: nn.Module) -> nn.Module:
    for hooks in (base._forward_pre_hooks, base._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_padded, _keep_unfused):
                del hooks[key]
    forget_expectation(base)
    return base


def remove_adapters(model: nn.Module, replacement: Callable[[AdapterModule], nn.Module]) -> None:
    """Replace every adapter by `replacement(adapter)`, and delete the record and the hooks of `attach`."""
    leave_the_end_to_others(adapter for _, adapter in adapters(model))
    replacements: dict[int, nn.Module] = {}
    for target in list(places(model)):
        if isinstance(target.module, AdapterModule):
            key = id(target.module)
            if key not in replacements:
                replacements[key] = replacement(target.module)
            # A block that had an adapter has its own table of children again.
            parent = target.parent.base if isinstance(target.parent, AdapterModule) else target.parent
            setattr(parent, target.attribute, replacements[key])
    del model.__dict__[_STATE]
    free_saving(model)
    free_fusing(model)
    forget(model)
    forget_expectation(model)
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_note_prefix, _forgive_frozen):
                del hooks[key]


def frozen_keys(model: nn.Module) -> set[str]:
    """The state dict keys of base parameters that do not train, with the keys of the scales of quantised ones."""
    adapter_ids = {id(p) for _, adapter in adapters(model) for p in adapter.adapter_parameters().values()}
    named = model.named_parameters(remove_duplicate=False)
    frozen = {n: getattr(p, "quant_state", None) for n, p in named if id(p) not in adapter_ids and not p.requires_grad}
    scales = {f"{n}.{key}" for n, state in frozen.items() if state is not None for key in state.as_dict(packed=True)}
    return set(frozen) | scales


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's parameters by name, trained ones included; a tied parameter has the first of its names."""
    own = {id(p) for _, adapter in adapters(model) for p in adapter.adapter_parameters().values()}
    return {n: p for n, p in model.named_parameters() if id(p) not in own}


def packed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers in which layers of other libraries hold quantised weights, by name: they are no running statistics.

    Args:
        model: A model with or without adapters.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        adapted = isinstance(module, AdapterModule)
        if foreign_quantisation(module.base if adapted else module):
            left_out = {*(module.adapter_tensors() if adapted else ()), *module._non_persistent_buffers_set}
            packed = {key: b for key, b in module._buffers.items() if b is not None and key not in left_out}
            found |= {f"{name}.{key}": buffer for key, buffer in packed.items()}
    return found


def unfrozen(model: nn.Module) -> dict[str, bool]:
    """Names of base parameters outside `train` that train all the same, or have trained since `attach`.

    Code of the user, or a callback such as Lightning's `BaseFinetuning`, may have unfrozen them. Every process has to
    call this if the model is sharded.

    Returns:
        Whether each of them trains at present.
    """
    state = attachment(model)
    known = set(state.trained_parameters)
    found = {}
    for name, parameter in base_parameters(model).items():
        if name in known:
            continue
        before = state.samples.get(name)
        moved = before is not None and has_changed(parameter, before)
        if moved or parameter.requires_grad or name in state.unfrozen:
            found[name] = parameter.requires_grad
    return found


def fit_in(adapter: AdapterModule, target: Target) -> None:
    """Prepare an adapter for the way in which the module that will hold it uses its layer.

    Raises:
        AdapterError: The adapter has to measure the inputs of a layer that is never called.
    """
    adapter.read_as_weight = adapter.read_as_weight or reads_weight(target.parent, target.attribute)
    if adapter.read_as_weight and adapter.calibrates and not adapter.needs_gradient:
        raise AdapterError(
            f"the model reads the weight of {target.name!r} and does not call it, so that the layer's inputs cannot be "
            f"measured: set exclude=[{target.name!r}], or start from the weight alone (start='pissa' of LoRA and DoRA, "
            "init='svd' of NestedLoRA)"
        )
    if isinstance(target.parent, nn.TransformerEncoderLayer):
        adapter.register_forward_pre_hook(_padded)
        adapter.register_forward_hook(_keep_unfused)


def _padded(module: nn.Module, args: Any) -> Any:
    """Pad a nested tensor, which nn.TransformerEncoder makes of rows of unequal length; adapters take plain ones."""
    if not args or not isinstance(args[0], Tensor) or not args[0].is_nested:
        return None
    rows: Any = args[0].to_padded_tensor(0.0)
    rows.lengths = [row.shape[0] for row in args[0].unbind()]
    return (rows, *args[1:])


def _keep_unfused(module: nn.Module, args: Any, output: Any) -> Any:
    """Undo `_padded`. A hook also turns off the fused path of nn.TransformerEncoderLayer, which calls no layer."""
    lengths = getattr(args[0], "lengths", None) if args else None
    if lengths is None:
        return None
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths, strict=True)])


def _note_prefix(model: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    attachment(model, several=True).prefix = prefix


def _forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    """Let frozen base parameters be absent from a state dict, as checkpoints hold only what training changed."""
    state = attachment(model, several=True)
    prefix = state.prefix
    if state.samples:  # what was loaded, and not trained, is no change
        state.samples |= samples({n: p for n, p in base_parameters(model).items() if n in state.samples})
    forgiven = {prefix + key for key in frozen_keys(model)}
    if called_by("safetensors.torch"):  # its load_model counts the names of tied weights that its file leaves out
        missing, tied = set(incompatible.missing_keys), defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied[id(parameter)].append(prefix + name)
        forgiven -= {name for names in tied.values() if not missing.issuperset(names) for name in names}
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in forgiven]
