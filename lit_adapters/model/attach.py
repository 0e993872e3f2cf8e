"""Puts adapters into a model, in place, and takes them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from lit_adapters.errors import AdapterError, TargetsNotFound
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.experts import find_experts
from lit_adapters.methods.method import Config, Factory, Method, to_methods
from lit_adapters.methods.targets import Target, head_modules, left_alone, matches, near_misses, peft_parameters, places
from lit_adapters.model.adapter_sets import AdapterSet, AdapterSets, room_for, sets_of
from lit_adapters.model.changes import samples
from lit_adapters.model.meta import refuse_offloaded, refuse_partly_loaded, require_placed
from lit_adapters.model.record import (
    DEFAULT,
    Attachment,
    adapters,
    attachment,
    fit_in,
    inner,
    is_in_use,
    packed_buffers,
    put_in,
    released,
    remove_adapters,
)
from lit_adapters.model.report import AdapterReport

# They look at the parameters of a model when they wrap it.
_WRAPPERS = (
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
)


def attach(
    model: nn.Module,
    methods: Method | Config | Iterable[Method | Config] | None,
    train: str | Sequence[str] = (),
    name: str = DEFAULT,
) -> AdapterReport:
    """Freeze `model`, put adapters around the targets of `methods`, and leave the modules of `train` trainable.

    This works in place, and after an error the model is as before. The keys of the base stay the same, and those of
    the adapters stand beside them; `load_state_dict(strict=True)` then accepts that frozen base keys are missing.

    A model may have several adapters with different names. The new ones are in use afterwards, and those that were in
    use wait: see `use`. They train copies of the parameters of `train`, which start at the base's values.

    Args:
        model: Any nn.Module.
        methods: A method, its `{class_path, init_args}` form, or a list of these; an empty list only freezes.
        train: The modules or parameters that train besides the adapters, as a list of name suffixes (["head"]) or a
            regular expression for whole names.
        name: The name of the adapters, for `use` and its kin.

    Returns:
        The adapters and the numbers of parameters; `print` shows a table.

    Raises:
        TargetsNotFound: A method, a name in its list of targets, or `train` matches nothing.
        AdapterError: The model has adapters of this name or merged ones, or is wrapped for DDP, weights are offloaded
            or only partly loaded, two methods want the same layer (LoRA and its kin share layers with BitFit alone), a
            layer at two places is chosen at one of them only, a method cannot adapt a layer, or `train` names a
            parameter that is tied to a frozen one or cannot train, or lacks one that other adapters have trained.
    """
    if any(f"{kind.__module__}.{kind.__name__}" in _WRAPPERS for m in model.modules() for kind in type(m).__mro__):
        raise AdapterError(
            f"{type(model).__name__} is wrapped for several processes already, which would not exchange the gradients "
            "of adapters; attach to the model first, and wrap it then"
        )
    model = inner(model)  # of torch.compile
    refuse_offloaded(model)
    with room_for(model, name) as sets:
        return _attach(model, to_methods(methods), train, name, sets)


def _attach(
    model: nn.Module, methods: list[Method], train: str | Sequence[str], name: str, sets: AdapterSets
) -> AdapterReport:
    single_methods = [part for method in methods for part in method.parts()]
    trained = _find_trained(model, train)
    own = sets.own_tensors(model, trained)
    head = {id(p) for h in head_modules(model) for p in h.parameters()}

    named = dict(model.named_parameters())
    # Every adapter is built before the model is changed.
    placed: list[tuple[Target, AdapterModule]] = []
    shared: dict[int, AdapterModule] = {}
    for target, build in assign(model, single_methods, train):
        adapter = shared.get(id(target.module)) or build()
        fit_in(adapter, target)
        refuse_partly_loaded(model, adapter)
        if _has_parameters(target.module):
            shared[id(target.module)] = adapter
        placed.append((target, adapter))

    adapted = {id(p) for _, adapter in placed for p in adapter.adapts()}
    selecting = [method for method in single_methods if hasattr(method, "targets")]
    left = left_alone(model, selecting, adapted, trained)
    every = [type(m).__name__ for m in selecting if m.targets == "all-linear"]
    experts = [f"{t.name}.{n}" for t, names in find_experts(model, "all-linear", (), train) for n in names]
    experts = [n for n in experts if n in left]
    statistics = model.state_dict(keep_vars=True).keys() - packed_buffers(model)
    required_grad = {n: p.requires_grad for n, p in named.items()}
    state = Attachment(
        methods=[m.to_config() for m in methods],
        train=train if isinstance(train, str) else list(train),
        trained_parameters=[n for n in named if n in trained],
        buffers=[n for n, _ in model.named_buffers() if n in statistics],
        required_grad=sets.required_grad or required_grad,
        samples=samples({n: p for n, p in named.items() if n not in trained}),
        names=(name,),
    )
    other_adapters = [n for n in peft_parameters(model) if named[n].requires_grad and n not in trained]
    put_in(model, state, placed)
    sets.add(name, AdapterSet(state, placed, own))
    if other_adapters:
        warnings.warn(
            f"attach freezes {len(other_adapters)} parameters of peft's adapters, {other_adapters[0]!r} first; name "
            "them in `train` if they are to go on training",
            stacklevel=3,
        )
    if every and experts:
        warnings.warn(
            f"{every[0]} does not adapt weights that several experts have in one parameter: {len(experts)} of them "
            f"stay as they are, {experts[0]!r} first. LoRA, DoRA and LoRAN adapt them; to leave them alone, name their "
            "modules in `exclude`",
            stacklevel=3,
        )
    sizes = {n: named[n].numel() for n in state.trained_parameters}
    shared_sizes: dict[str, int] = {}
    for _, adapter in adapters(model):
        for key, parameter in adapter.shared_parameters().items():
            kind = adapter.method_of(key)
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


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove all adapters; the base has its own modules and `requires_grad` again.

    Modules of `train` and buffers keep their trained values; frozen parameters never changed.

    Args:
        model: The module given to `attach`.
        name: Remove the adapters of this name alone. If they are in use, none is afterwards.

    Raises:
        AdapterError: The model has no adapters, or none of this name; or they are merged or offloaded.
    """
    model, sets = inner(model), sets_of(model)
    if name is not None and list(sets.by_name) != [name]:
        sets.remove(model, name)
        return
    merged = [name for name, adapter in adapters(model) if adapter.merged]
    if merged:
        raise AdapterError(f"{merged[0]!r} is merged; call lit_adapters.unmerge(model) before detaching")
    require_placed(model, "detaching")
    required_grad = sets.required_grad or attachment(model, several=True).required_grad
    if is_in_use(model):
        remove_adapters(model, released)
    sets.forget(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(required_grad.get(key, True))
