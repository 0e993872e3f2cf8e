"""Put adapters into a model, in place, and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_adapters.errors import AdapterError, TargetsNotFound
from lit_adapters.layout import is_linear
from lit_adapters.methods.base import AdapterModule, Config, Method, to_methods
from lit_adapters.report import AdapterReport
from lit_adapters.targets import Target, find_targets, head_modules, matches, places

_STATE = "_lit_adapters"


@dataclass
class Attachment:
    """What `attach` was asked for and found, kept on the model for saving and for detaching."""

    methods: list[dict[str, Any]]
    train: str | list[str]
    trained_parameters: list[str]
    trained_buffers: list[str]
    required_grad: dict[str, bool] = field(default_factory=dict)
    prefix: str = ""  # of this model inside the one that is loading a state dict, while it loads


def adapters(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """All adapters of a model as (qualified name, module)."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule):
            yield name, module


def attachment(model: nn.Module) -> Attachment:
    """The record that `attach` left on `model`.

    Raises:
        AdapterError: nothing was attached to this very module.
    """
    state = model.__dict__.get(_STATE)
    if state is None:
        raise AdapterError(f"{type(model).__name__} has no adapters; call lit_adapters.attach(model, ...) first")
    return state  # type: ignore[no-any-return]


def attach(
    model: nn.Module,
    methods: Method | Config | Iterable[Method | Config] | None,
    train: str | Sequence[str] = (),
) -> AdapterReport:
    """Freeze `model`, put adapters around the targets of `methods`, and leave the modules of `train` trainable.

    Works in place and all or nothing: after an error the model is as before. Base keys keep their names, adapter keys
    stand beside them; `load_state_dict(strict=True)` then forgives missing frozen base keys and nothing else.

    Args:
        model: any nn.Module.
        methods: a method, its `{class_path, init_args}` form, or a list; an empty list only freezes.
        train: modules or parameters that train besides the adapters, as a list of name suffixes (["head"]) or a
            regular expression for whole names.

    Raises:
        TargetsNotFound: a method or `train` matches nothing.
        AdapterError: adapters are already there, two methods want the same layer, or a layer cannot carry its method.
    """
    if _STATE in model.__dict__ or any(True for _ in adapters(model)):
        raise AdapterError(
            f"{type(model).__name__} already has adapters (merged ones count while their wrappers stay); "
            "call lit_adapters.detach or lit_adapters.merge first, or give all methods to one attach"
        )
    leaves = [part for method in to_methods(methods) for part in method.parts()]
    trained_parameters, trained_buffers = _find_trained(model, train)
    head = {id(p) for h in head_modules(model) for p in h.parameters()}

    named = dict(model.named_parameters())  # before wrapping: a wrapped layer shares its tables with the adapter
    wrapped: list[tuple[Target, AdapterModule]] = []
    try:
        for target, method in _assign(model, leaves, train):
            shared = next((w for t, w in wrapped if t.module is target.module), None)
            adapter = shared or method.wrap(target.module, target.name, target.parent)
            adapter.qualified_name = adapter.qualified_name or target.name
            wrapped.append((target, adapter))
    except Exception:
        for _, adapter in wrapped:
            adapter.unwrapped()
        raise

    state = Attachment(
        methods=[m.to_config() for m in to_methods(methods)],
        train=train if isinstance(train, str) else list(train),
        trained_parameters=trained_parameters,
        trained_buffers=trained_buffers,
        required_grad={name: p.requires_grad for name, p in named.items()},
    )
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained_parameters)
    for target, adapter in wrapped:
        setattr(target.parent, target.attribute, adapter)
    model.__dict__[_STATE] = state
    model.register_load_state_dict_pre_hook(_note_prefix)
    model.register_load_state_dict_post_hook(_forgive_frozen)

    rows = [(n, a.method, sum(p.numel() for p in a.adapter_parameters().values())) for n, a in adapters(model)]
    sizes = {n: named[n].numel() for n in trained_parameters}
    # A head of an unknown kind is what `train` names.
    own = {n for n in sizes if id(named[n]) in head} if head else set(sizes)
    return AdapterReport(rows, sizes, sum(sizes[n] for n in own), sum(p.numel() for p in model.parameters()))


def _assign(model: nn.Module, methods: list[Method], train: str | Sequence[str]) -> Iterator[tuple[Target, Method]]:
    owner: dict[tuple[int, str], Method] = {}
    for method in methods:
        for target in _separate(find_targets(model, method, train)):
            key = (id(target.parent), target.attribute)
            if key in owner:
                raise AdapterError(
                    f"{type(owner[key]).__name__} and {type(method).__name__} both want {target.name!r}; "
                    "give them different targets, or exclude the layer from one"
                )
            owner[key] = method
            yield target, method


def _separate(targets: list[Target]) -> Iterator[Target]:
    """One activation object that serves several layers gets an adapter in each; layers with weights stay shared."""
    seen: set[int] = set()
    for target in targets:
        module = target.module
        if id(module) in seen and not is_linear(module) and not any(True for _ in module.parameters()):
            module = copy.copy(module)
            target = Target(target.name, target.parent, target.attribute, module)
        seen.add(id(module))
        yield target


def _find_trained(model: nn.Module, train: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters and persistent buffers that `train` selects."""
    if not train:
        return [], []
    specs: list[str | Sequence[str]] = [train] if isinstance(train, str) else [[s] for s in train]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict(keep_vars=True)}
    chosen: set[str] = set()
    for spec in specs:
        modules = [t.name for t in places(model) if matches(t.name, spec)]
        found = {n for n in (*parameters, *buffers) if matches(n, spec) or any(n.startswith(f"{m}.") for m in modules)}
        if not found:
            names = ", ".join([t.name for t in places(model)][-5:])
            raise TargetsNotFound(
                f"train={spec!r} matches no parameter of {type(model).__name__}. Its last modules are {names}"
            )
        chosen |= found
    for name in chosen & parameters.keys():
        twins = [n for n, p in parameters.items() if p is parameters[name] and n not in chosen]
        if twins:
            raise AdapterError(
                f"{name!r} is tied to {twins[0]!r}, which stays frozen; training one would change both. "
                f"Untie them, or leave {name!r} out of `train`"
            )
    return [n for n in dict(model.named_parameters()) if n in chosen], [n for n in buffers if n in chosen]


def detach(model: nn.Module) -> None:
    """Remove all adapters; the base has its own modules, values and requires_grad again.

    Modules of `train` keep what they have learned.

    Raises:
        AdapterError: the model has none, or a merge is in effect.
    """
    state = attachment(model)
    merged = [name for name, adapter in adapters(model) if adapter.merged]
    if merged:
        raise AdapterError(f"{merged[0]!r} is merged; call lit_adapters.unmerge(model) before detaching")
    remove_adapters(model, lambda adapter: adapter.unwrapped())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, True))


def remove_adapters(model: nn.Module, successor: Any) -> None:
    """Put `successor(adapter)` in the place of every adapter, and forget the attachment."""
    successors: dict[int, nn.Module] = {}
    for target in list(places(model)):
        if isinstance(target.module, AdapterModule):
            key = id(target.module)
            if key not in successors:
                successors[key] = successor(target.module)
            setattr(target.parent, target.attribute, successors[key])
    del model.__dict__[_STATE]
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_note_prefix, _forgive_frozen):
                del hooks[key]


def frozen_keys(model: nn.Module) -> set[str]:
    """Keys of the parameters that neither belong to an adapter nor train."""
    own = {id(p) for _, adapter in adapters(model) for p in adapter.adapter_parameters().values()}
    named = model.named_parameters(remove_duplicate=False)
    return {n for n, p in named if id(p) not in own and not p.requires_grad}


def _note_prefix(model: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    attachment(model).prefix = prefix


def _forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    """Frozen base parameters may be absent from a state dict: checkpoints hold what changed."""
    prefix = attachment(model).prefix
    forgiven = {prefix + key for key in frozen_keys(model)}
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in forgiven]
