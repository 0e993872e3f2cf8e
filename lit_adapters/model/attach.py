"""Puts adapters into a model, in place, and takes them out again."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, TargetsNotFound
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.matrix_layers import is_quantised, stop_repacking
from lit_adapters.methods.method import Config, Factory, Method, to_methods
from lit_adapters.methods.read_weights import reads_weight
from lit_adapters.methods.rewritten import called_by
from lit_adapters.methods.targets import Target, head_modules, left_alone, matches, near_misses, peft_parameters, places
from lit_adapters.model.changes import has_changed, samples
from lit_adapters.model.fuse_guard import free_fusing, guard_fusing
from lit_adapters.model.meta import (
    expect_values,
    forget_expectation,
    refuse_offloaded,
    refuse_partly_loaded,
    require_placed,
)
from lit_adapters.model.report import AdapterReport
from lit_adapters.model.save_guard import free_saving, guard_saving
from lit_adapters.model.unfinished import leave_the_end_to_others
from lit_adapters.model.watch import forget, watch

_STATE = "_lit_adapters"
# They look at the parameters of a model when they wrap it.
_WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
)


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
    """

    methods: list[dict[str, Any]]
    train: str | list[str]
    trained_parameters: list[str]
    buffers: list[str]
    required_grad: dict[str, bool] = field(default_factory=dict)
    prefix: str = ""
    samples: dict[str, Tensor] = field(default_factory=dict)
    unfrozen: list[str] = field(default_factory=list)


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


def attachment(model: nn.Module) -> Attachment:
    """The record that `attach` left on `model`.

    Raises:
        AdapterError: Nothing was attached to this module itself.
    """
    state = model.__dict__.get(_STATE)
    if state is None:
        inside = next((name for name, _ in attached(model)), None)
        fix = f"give its part {inside!r}, which has them" if inside else "call lit_adapters.attach(model, ...) first"
        raise AdapterError(f"{type(model).__name__} has no adapters of its own; {fix}")
    return state


def attach(
    model: nn.Module,
    methods: Method | Config | Iterable[Method | Config] | None,
    train: str | Sequence[str] = (),
) -> AdapterReport:
    """Freeze `model`, put adapters around the targets of `methods`, and leave the modules of `train` trainable.

    This works in place, and after an error the model is as before. The keys of the base stay the same, and those of
    the adapters stand beside them; `load_state_dict(strict=True)` then accepts that frozen base keys are missing.

    Args:
        model: Any nn.Module.
        methods: A method, its `{class_path, init_args}` form, or a list of these; an empty list only freezes.
        train: The modules or parameters that train besides the adapters, as a list of name suffixes (["head"]) or a
            regular expression for whole names.

    Returns:
        The adapters and the numbers of parameters; `print` shows a table.

    Raises:
        TargetsNotFound: A method, a name in its list of targets, or `train` matches nothing.
        AdapterError: The model has adapters already or is wrapped for DDP, weights are offloaded or only partly
            loaded, two methods want the same layer (LoRA and its kin share layers with BitFit alone), a layer at two
            places is chosen at one of them only, a method cannot adapt a layer, or `train` names a parameter that is
            tied to a frozen one or cannot train.
    """
    if _STATE in model.__dict__ or any(True for _ in adapters(model)):
        raise AdapterError(
            f"{type(model).__name__} already has adapters (merged ones count while their wrappers stay); "
            "call lit_adapters.detach or lit_adapters.merge first, or give all methods to one attach"
        )
    if any(f"{kind.__module__}.{kind.__name__}" in _WRAPPERS for m in model.modules() for kind in type(m).__mro__):
        raise AdapterError(
            f"{type(model).__name__} is wrapped for several processes already, which would not exchange the gradients "
            "of adapters; attach to the model first, and wrap it then"
        )
    refuse_offloaded(model)
    single_methods = [part for method in to_methods(methods) for part in method.parts()]
    trained = _find_trained(model, train)
    head = {id(p) for h in head_modules(model) for p in h.parameters()}

    named = dict(model.named_parameters())
    # Every adapter is built before the model is changed.
    wrapped: list[tuple[Target, AdapterModule]] = []
    shared: dict[int, AdapterModule] = {}
    for target, build in assign(model, single_methods, train):
        adapter = shared.get(id(target.module)) or build()
        fit_in(adapter, target)
        refuse_partly_loaded(model, adapter)
        if _has_parameters(target.module):
            shared[id(target.module)] = adapter
        wrapped.append((target, adapter))

    adapted = {id(p) for target, _ in wrapped for p in target.module.parameters()}
    selecting = [method for method in single_methods if hasattr(method, "targets")]
    left = left_alone(model, selecting, adapted, trained)
    persistent = model.state_dict(keep_vars=True)
    state = Attachment(
        methods=[m.to_config() for m in to_methods(methods)],
        train=train if isinstance(train, str) else list(train),
        trained_parameters=[n for n in named if n in trained],
        buffers=[n for n, _ in model.named_buffers() if n in persistent],
        required_grad={name: p.requires_grad for name, p in named.items()},
        samples=samples({name: p for name, p in named.items() if name not in trained}),
    )
    other_adapters = [name for name in peft_parameters(model) if named[name].requires_grad and name not in trained]
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    for module in model.modules():  # also layers without an adapter, as gradients pass through them
        if is_quantised(module):
            stop_repacking(module)
    for target, adapter in wrapped:
        setattr(target.parent, target.attribute, adapter)
    for adapter in {id(adapter): adapter for _, adapter in wrapped}.values():  # one may stand at several places
        adapter.adopt()
        if any(t.is_meta for t in adapter.adapter_tensors().values()):
            adapter.register_forward_pre_hook(expect_values, with_kwargs=True)
            if expect_values not in model._forward_pre_hooks.values():  # layers without an adapter may run first
                model.register_forward_pre_hook(expect_values, prepend=True, with_kwargs=True)
    model.__dict__[_STATE] = state
    model.register_load_state_dict_pre_hook(_note_prefix)
    model.register_load_state_dict_post_hook(_forgive_frozen)

    if wrapped:
        guard_saving(model)
        guard_fusing(model)
    watch(model, dict(adapters(model)))
    if other_adapters:
        warnings.warn(
            f"attach freezes {len(other_adapters)} parameters of peft's adapters, {other_adapters[0]!r} first; name "
            "them in `train` if they are to go on training",
            stacklevel=2,
        )
    sizes = {n: named[n].numel() for n in state.trained_parameters}
    shared_sizes: dict[str, int] = {}
    for _, adapter in adapters(model):
        for name, parameter in adapter.shared_parameters().items():
            kind = adapter.method_of(name)
            shared_sizes[kind] = shared_sizes.get(kind, 0) + parameter.numel()
    # Without a known head, everything in `train` counts as the head.
    of_head = {n for n in sizes if id(named[n]) in head} if head else set(sizes)
    return AdapterReport(
        adapters=[(n, kind, size) for n, a in adapters(model) for kind, size in _sizes(a).items()],
        trained={n: size for n, size in sizes.items() if n not in of_head},
        head={n: size for n, size in sizes.items() if n in of_head},
        total=sum(_logical_size(p) for p in model.parameters()),
        left={n: _logical_size(named[n]) for n in left},
        shared=shared_sizes,
    )


def _sizes(adapter: AdapterModule) -> dict[str, int]:
    """The number of trained parameters of each method in an adapter."""
    sizes = {adapter.method: 0}
    for name, parameter in adapter.adapter_parameters().items():
        kind = adapter.method_of(name)
        sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    return sizes


def _logical_size(parameter: nn.Parameter) -> int:
    """The number of elements; for a packed weight that of the original weight."""
    size: int = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape).numel()
    return size


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def assign(model: nn.Module, methods: list[Method], train: str | Sequence[str]) -> list[tuple[Target, Factory]]:
    """The targets of all methods, each with the factory of its adapter.

    A layer at several places is adapted once, an activation once for each place.

    Raises:
        AdapterError: Two methods that cannot share a layer want the same one, or a layer at several places is not
            chosen at all of them.
    """
    owners: dict[tuple[int, str], list[Method]] = {}
    assigned: dict[tuple[int, str], tuple[Target, Factory]] = {}
    for method in methods:
        for target, build in method.find(model, train):
            key = (id(target.parent), target.attribute)
            if key in assigned:
                _, build_first = assigned[key]
                build = _build_both(target.name, [(m, build_first) for m in owners[key]] + [(method, build)])
            owners.setdefault(key, []).append(method)
            assigned[key] = target, build
    chosen = {id(t.module): (t, owners[key]) for key, (t, _) in assigned.items() if _has_parameters(t.module)}
    for place in places(model):
        first, adapted_by = chosen.get(id(place.module), (place, []))
        here = owners.get((id(place.parent), place.attribute), [])
        if adapted_by and list(map(id, adapted_by)) != list(map(id, here)):
            raise AdapterError(
                f"{place.name!r} and {first.name!r} are one and the same layer; give both to the same method, "
                "or exclude both"
            )
    return list(assigned.values())


def _build_both(name: str, wanting: list[tuple[Method, Factory]]) -> Factory:
    """What builds the one adapter of a layer that several methods want.

    Raises:
        AdapterError: At once, or when it builds: these methods cannot share a layer.
    """
    second, build_second = wanting[-1]
    # Of two that share the layer already, the one that does not share it is in the way.
    first, build_first = next((w for w in wanting[:-1] if type(w[0]).extend is Method.extend), wanting[0])
    error = AdapterError(
        f"{type(first).__name__} and {type(second).__name__} both want {name!r}; "
        "give them different targets, or exclude the layer from one"
    )
    if len(wanting) > 2 or all(type(m).extend is Method.extend for m in (first, second)):
        raise error

    def build() -> AdapterModule:
        adapters = build_first(), build_second()  # both, as each method checks the layer
        both = second.extend(adapters[0]) or first.extend(adapters[1])
        if both is None:
            raise error
        return both

    return build


def _find_trained(model: nn.Module, train: str | Sequence[str]) -> set[str]:
    """The names of the parameters that `train` selects.

    Raises:
        TargetsNotFound: A part of `train` matches nothing.
        AdapterError: A selected parameter is of whole numbers, or tied to a parameter that is not selected.
    """
    if not train:
        return set()
    specs: list[str | Sequence[str]] = [train] if isinstance(train, str) else [[s] for s in train]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [t.name for t in places(model)]
    chosen: set[str] = set()
    for spec in specs:
        modules = [n for n in names if matches(n, spec)]
        found = {n for n in parameters if matches(n, spec) or any(n.startswith(f"{m}.") for m in modules)}
        if not found:
            raise TargetsNotFound(
                f"train={spec!r} matches no parameter of {type(model).__name__}.{near_misses(spec, names)} "
                f"Its last modules are {', '.join(names[-5:])}."
            )
        chosen |= found
    for name in chosen:
        if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
            raise AdapterError(
                f"{name!r} is a weight of {parameters[name].dtype}, which cannot train; leave it out of `train`"
            )
        twins = [n for n, p in parameters.items() if p is parameters[name] and n not in chosen]
        if twins:
            raise AdapterError(
                f"{name!r} is tied to {twins[0]!r}, which stays frozen; training one would change both. "
                f"Untie them, or leave {name!r} out of `train`"
            )
    return chosen


def detach(model: nn.Module) -> None:
    """Remove all adapters; the base has its own modules and `requires_grad` again.

    Modules of `train` and buffers keep their trained values; frozen parameters never changed.

    Raises:
        AdapterError: The model has no adapters, or they are merged or offloaded.
    """
    state = attachment(model)
    merged = [name for name, adapter in adapters(model) if adapter.merged]
    if merged:
        raise AdapterError(f"{merged[0]!r} is merged; call lit_adapters.unmerge(model) before detaching")
    require_placed(model, "detaching")
    remove_adapters(model, released)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, True))


def released(adapter: AdapterModule) -> nn.Module:
    """The base of an adapter, without hooks of `attach`."""
    base = adapter.unwrapped()
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
    """Prepare an adapter for the way in which the module that will hold it uses its layer."""
    adapter.read_as_weight = adapter.read_as_weight or reads_weight(target.parent, target.attribute)
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
    attachment(model).prefix = prefix


def _forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    """Let frozen base parameters be absent from a state dict, as checkpoints hold only what training changed."""
    state = attachment(model)
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
