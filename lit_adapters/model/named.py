"""Chooses which adapters of a model are in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.targets import Target
from lit_adapters.model.adapter_sets import AdapterSets, install, rejoin, sets_of
from lit_adapters.model.record import Attachment, attachment, inner, is_in_use, put_in
from lit_adapters.model.together import AdapterSum, RowAdapters, Together


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, in the order in which they were attached."""
    return list(sets_of(model).by_name)


def in_use(model: nn.Module) -> list[str]:
    """The names of the adapters that act at present; empty if the pretrained model acts alone."""
    return list(attachment(model, several=True).names) if is_in_use(model) else []


def use(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose which adapters act.

    One acts as it was attached: it can be trained, saved and merged. The others wait outside the module tree, and are
    in no optimiser and no state dict; they follow the model to another device when they are used again.

    Of several at once, updates of weights add up, and so do the changes of learned functions:
    y = y0 + sum_i (y_i - y0), with y0 of the pretrained layer and y_i of its i-th adapter. They do not train then.
    `merge` makes the sum as fast as the base.

    Args:
        model: The module given to `attach`.
        names: A name, or a list of names; an empty list leaves the pretrained model, with the values that the first
            adapters have trained in modules of `train`.

    Raises:
        AdapterError: There are no adapters of a name, the ones in use are merged, offloaded, sharded or on the meta
            device; or several are to act that train the same parameter, or whose running statistics differ.
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    model, sets = inner(model), sets_of(model)
    for name in wanted:
        sets.get(name)
    if wanted == in_use(model):
        return
    if len(wanted) > 1:
        _put_together(model, sets, wanted, AdapterSum)
        return
    sets.take_out(model)
    if wanted:
        sets.put_in(model, wanted[0])
    else:
        install(model, sets.originals)


@contextmanager
def using(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """Inside the block, the adapters `names` act; afterwards those that acted before do.

    Args:
        model: The module given to `attach`.
        names: As for `use`.

    Raises:
        AdapterError: As for `use`.
    """
    before = in_use(model)
    use(model, names)
    try:
        yield
    finally:
        use(model, before)


@contextmanager
def rows(model: nn.Module, names: Iterable[str | None]) -> Iterator[None]:
    """Inside the block, each row of a batch runs with the adapters of its own name.

    Each layer computes the rows of one name together, so that a batch costs little more than one with a single adapter.

        with la.rows(model, ["german", "french", None]):
            model(batch)  # of three rows; the third one without an adapter

    Args:
        model: The module given to `attach`.
        names: One for each row of the batches; None for the pretrained model.

    Raises:
        AdapterError: As for `use`; adapters train a base parameter, adapt a whole block or an expert, or change a
            weight that the model reads without calling its layer. Inside the block: the first dimension of the input of
            a layer is not the rows.
    """
    by_row = list(names)
    wanted = [name for name in dict.fromkeys(by_row) if name is not None]
    model, sets, before = inner(model), sets_of(model), in_use(model)
    for name in wanted:
        for target, adapter in sets.get(name).placed:
            _check_rows(target, adapter)
        trains = sets.by_name[name].state.trained_parameters
        if trains:
            raise AdapterError(
                f"the adapters {name!r} train {trains[0]!r}, and a batch has one value of it for all rows; run the "
                "rows in separate batches with lit_adapters.use"
            )
    if not by_row:
        raise AdapterError("names is empty; give one name, or None, for each row of the batch")
    time_first = [name for name, m in model.named_modules() if getattr(m, "batch_first", True) is False]
    if time_first:
        raise AdapterError(f"{time_first[0]!r} has batch_first=False, so that its first dimension is not the rows")
    _put_together(model, sets, wanted, lambda parts: RowAdapters(parts, by_row))
    try:
        yield
    finally:
        use(model, before)


def _check_rows(target: Target, adapter: AdapterModule) -> None:
    if adapter.read_as_weight:
        raise AdapterError(f"the model reads the weight of {target.name!r} for all rows at once; exclude this layer")
    if "expert" in target.name:
        raise AdapterError(f"{target.name!r} gets tokens of several rows mixed; exclude experts")
    if any(True for _ in target.module.children()):
        raise AdapterError(f"{target.name!r} is a whole block, whose rows cannot be computed apart")


def _put_together(
    model: nn.Module,
    sets: AdapterSets,
    names: Sequence[str],
    build: Callable[[dict[str, AdapterModule]], Together],
) -> None:
    """Put layers with the adapters of several sets into their places.

    Raises:
        AdapterError: The sets have different values of a base parameter or buffer.
    """
    chosen = {name: sets.get(name) for name in names}
    values = {name: sets.originals | one.own for name, one in chosen.items()}
    for key in sets.originals:
        held = {id(v[key]): (name, v[key]) for name, v in values.items()}
        (first, value), *others = held.values()
        trained = [name for name, one in chosen.items() if key in one.state.trained_parameters]
        different = next((n for n, v in others if len(trained) > 1 or (not trained and not torch.equal(value, v))), "")
        if different:
            raise AdapterError(f"{first!r} and {different!r} have different values of {key!r}, which do not add up")
    both = [n for n, one in chosen.items() if set(one.state.trained_parameters) & sets.trained]
    if len(both) > 1:
        raise AdapterError(f"{both[0]!r} and {both[1]!r} train the same parameters, whose values do not add up")
    sets.take_out(model)
    install(model, sets.originals)
    for one in chosen.values():
        install(model, {key: t for key, t in one.own.items() if key in one.state.trained_parameters})
    parts: dict[tuple[int, str], tuple[Target, dict[str, AdapterModule]]] = {}
    for name, one in chosen.items():
        rejoin(model, one.placed)
        for target, adapter in one.placed:
            parts.setdefault((id(target.parent), target.attribute), (target, {}))[1][name] = adapter
    made: dict[tuple[int, ...], Together] = {}  # a layer at several places is one
    placed: list[tuple[Target, AdapterModule]] = []
    for target, adapters in parts.values():
        key_of_layer = tuple(map(id, adapters.values()))
        if key_of_layer not in made:
            made[key_of_layer] = build(adapters)
            made[key_of_layer].read_as_weight = any(a.read_as_weight for a in adapters.values())
        placed.append((target, made[key_of_layer]))
    first_state = next(iter(chosen.values())).state if chosen else None
    put_in(
        model,
        Attachment(
            methods=[method for one in chosen.values() for method in one.state.methods],
            train=[],
            trained_parameters=[],
            buffers=first_state.buffers if first_state else [],
            required_grad=sets.required_grad,
            names=tuple(names),
        ),
        placed,
    )
