"""Chooses which adapters of a model are in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.experts import ExpertsAdapter
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
            adapters have trained in modules of `train`, and the running statistics that they have moved.

    Raises:
        AdapterError: There are no adapters of a name, the ones in use are merged, offloaded, sharded or on the meta
            device; or several are to act that train the same parameter, or whose running statistics differ.
    """
    _change(model, _Use(tuple([names] if isinstance(names, str) else dict.fromkeys(names))))


@contextmanager
def using(model: nn.Module, names: str | Sequence[str]) -> Iterator[None]:
    """Inside the block, the adapters `names` act; afterwards those that acted before do.

    Args:
        model: The module given to `attach`.
        names: As for `use`.

    Raises:
        AdapterError: As for `use`.
    """
    before = _present(model)
    use(model, names)
    try:
        yield
    finally:
        _change(model, before)


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
    by_row, before = tuple(names), _present(model)
    wanted = tuple(name for name in dict.fromkeys(by_row) if name is not None)
    model, sets = inner(model), sets_of(model)
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
    _change(model, _Use(wanted, by_row))
    try:
        yield
    finally:
        _change(model, before)


@dataclass(frozen=True)
class _Use:
    """Which adapters act: none, one, the sum of several, or those of each row."""

    names: tuple[str, ...] = ()
    by_row: tuple[str | None, ...] | None = None


def _present(model: nn.Module) -> _Use:
    """What is in use at present."""
    if not is_in_use(model):
        return _Use()
    state = attachment(model, several=True)
    return _Use(state.names, state.by_row)


def _change(model: nn.Module, wanted: _Use) -> None:
    """Change which adapters act; if that fails, those that acted before do."""
    model, sets, before = inner(model), sets_of(model), _present(model)
    sets.check_places(wanted.names)
    if wanted == before:
        return
    if wanted.by_row is not None or len(wanted.names) > 1:
        _check_values(sets, wanted.names)
    sets.take_out(model)
    try:
        _put_in(model, sets, wanted)
    except BaseException:
        if is_in_use(model):
            sets.take_out(model)
        _put_in(model, sets, before)
        raise


def _put_in(model: nn.Module, sets: AdapterSets, wanted: _Use) -> None:
    if wanted.by_row is not None or len(wanted.names) > 1:
        _put_together(model, sets, wanted)
    elif wanted.names:
        sets.put_in(model, wanted.names[0])
    else:
        install(model, sets.originals)


def _check_rows(target: Target, adapter: AdapterModule) -> None:
    if adapter.read_as_weight:
        raise AdapterError(f"the model reads the weight of {target.name!r} for all rows at once; exclude this layer")
    if isinstance(adapter, ExpertsAdapter) or "expert" in target.name:
        raise AdapterError(f"{target.name!r} gets tokens of several rows mixed; exclude experts")
    if any(True for _ in target.module.children()):
        raise AdapterError(f"{target.name!r} is a whole block, whose rows cannot be computed apart")


def _check_values(sets: AdapterSets, names: Sequence[str]) -> None:
    """Check that adapters can act together.

    Raises:
        AdapterError: They have different values of a base parameter or buffer.
    """
    chosen = {name: sets.get(name) for name in names}
    values = {name: sets.originals | one.own for name, one in chosen.items()}
    for key in sets.originals:
        held = {id(v[key]): (name, v[key]) for name, v in values.items()}
        if not held:
            continue
        (first, value), *others = held.values()
        trained = [name for name, one in chosen.items() if key in one.state.trained_parameters]
        different = next((n for n, v in others if len(trained) > 1 or (not trained and not torch.equal(value, v))), "")
        if different:
            raise AdapterError(f"{first!r} and {different!r} have different values of {key!r}, which do not add up")
    both = [n for n, one in chosen.items() if set(one.state.trained_parameters) & sets.trained]
    if len(both) > 1:
        raise AdapterError(f"{both[0]!r} and {both[1]!r} train the same parameters, whose values do not add up")


def _put_together(model: nn.Module, sets: AdapterSets, wanted: _Use) -> None:
    """Put layers with the adapters of several sets into their places, in a model without adapters."""
    chosen = {name: sets.get(name) for name in wanted.names}
    install(model, sets.originals)
    for one in chosen.values():  # what they have of their own is the same, or only one of them has it
        trained = one.state.trained_parameters
        install(model, {key: t for key, t in one.own.items() if key in trained or key in one.state.buffers})
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
            layer = AdapterSum(adapters) if wanted.by_row is None else RowAdapters(adapters, wanted.by_row)
            layer.read_as_weight = any(a.read_as_weight for a in adapters.values())
            made[key_of_layer] = layer
        placed.append((target, made[key_of_layer]))
    put_in(
        model,
        Attachment(
            methods=[method for one in chosen.values() for method in one.state.methods],
            train=[],
            trained_parameters=[],
            buffers=next((one.state.buffers for one in chosen.values()), []),
            required_grad=sets.required_grad,
            names=wanted.names,
            by_row=wanted.by_row,
        ),
        placed,
    )
