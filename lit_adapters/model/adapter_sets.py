"""All adapters of a model by name. Those that are not in use wait outside the module tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.targets import Target
from lit_adapters.model.meta import require_loaded, require_placed
from lit_adapters.model.record import (
    SETS,
    Attachment,
    adapters,
    attachment,
    base_parameters,
    fit_in,
    inner,
    is_in_use,
    packed_buffers,
    put_in,
    remove_adapters,
    taken_out,
)
from lit_adapters.model.sharding import refuse_sharded


@dataclass
class AdapterSet:
    """The adapters of one name.

    Attributes:
        state: The record that they leave on the model.
        placed: The adapters, each with its place.
        own: Base parameters and buffers that have values of their own for this set, by name.
        trains: `requires_grad` of each base parameter when this set was taken out; the user may have changed it.
    """

    state: Attachment
    placed: list[tuple[Target, AdapterModule]]
    own: dict[str, Tensor]
    trains: dict[str, bool] = field(default_factory=dict)


@dataclass
class AdapterSets:
    """The adapters of one model.

    Attributes:
        by_name: The sets, in the order of `attach`.
        originals: The base's tensors where a set has its own, by name.
        trained: Names of base parameters that the first set trains in place.
        required_grad: `requires_grad` of each base parameter before the first `attach`.
    """

    by_name: dict[str, AdapterSet] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    required_grad: dict[str, bool] = field(default_factory=dict)

    def get(self, name: str) -> AdapterSet:
        """The set of a name.

        Raises:
            AdapterError: There is none.
        """
        if name not in self.by_name:
            known = ", ".join(map(repr, self.by_name)) or "none"
            raise AdapterError(f"the model has no adapters called {name!r}; it has {known}")
        return self.by_name[name]

    def add(self, name: str, new: AdapterSet) -> None:
        """Keep a set that `attach` has just put in."""
        if not self.by_name:
            self.trained = set(new.state.trained_parameters)
            self.required_grad = new.state.required_grad
        self.by_name[name] = new

    def remove(self, model: nn.Module, name: str) -> None:
        """Remove one set of several; if it is in use, no adapter is afterwards.

        Raises:
            AdapterError: There is no such set, or adapters are merged.
        """
        self.get(name)
        if is_in_use(model) and name in attachment(model, several=True).names:
            self.take_out(model)
            install(model, self.originals)
        del self.by_name[name]

    def forget(self, model: nn.Module) -> None:
        """Forget all sets; none may be in use."""
        model.__dict__.pop(SETS, None)

    def own_tensors(self, model: nn.Module, trained: Iterable[str]) -> dict[str, Tensor]:
        """Give a further set its own copies of what it may change of the base, in their places, and return them.

        Args:
            model: The model, without adapters.
            trained: Names of the base parameters that the new set trains.

        Returns:
            The copies by name; nothing for the first set, which uses the base's own tensors.

        Raises:
            AdapterError: The first set has trained a parameter that the new one does not train.
        """
        if not self.by_name:
            return {}
        trained = set(trained)
        left = sorted(self.trained - trained)
        if left:
            raise AdapterError(
                f"{left[0]!r} trains with the adapters {next(iter(self.by_name))!r}, so that others would run with its "
                "trained values; name it in `train`, or attach adapters without `train` first"
            )
        parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
        statistics = model.state_dict(keep_vars=True).keys() - packed_buffers(model)
        copies: dict[int, Tensor] = {}  # a tied parameter has one copy
        own: dict[str, Tensor] = {}
        for key in trained:
            original = parameters[key]
            if id(original) not in copies:
                copies[id(original)] = nn.Parameter(original.detach().clone())
            own[key] = copies[id(original)]
        own |= {key: b.detach().clone() for key, b in buffers.items() if key in statistics}
        for key in own:
            self.originals.setdefault(key, parameters[key] if key in parameters else buffers[key])
        install(model, own)
        return own

    def take_out(self, model: nn.Module) -> None:
        """Take the adapters in use out of the model.

        Raises:
            AdapterError: They are merged, offloaded, sharded or on the meta device.
        """
        if not is_in_use(model):
            return
        merged = [name for name, adapter in adapters(model) if adapter.merged]
        if merged:
            raise AdapterError(f"{merged[0]!r} is merged; call lit_adapters.unmerge(model) first")
        refuse_sharded(model, "changing adapters")
        require_placed(model, "changing adapters")
        require_loaded(model, "changing adapters")
        state = attachment(model, several=True)
        if state.is_one and state.names[0] in self.by_name:
            trains = {name: p.requires_grad for name, p in base_parameters(model).items()}
            self.by_name[state.names[0]].trains = trains
        remove_adapters(model, taken_out)

    def put_in(self, model: nn.Module, name: str) -> None:
        """Use one set in a model without adapters."""
        chosen = self.get(name)
        install(model, self.originals | chosen.own)
        rejoin(model, chosen.placed)
        put_in(model, chosen.state, chosen.placed)
        for key, parameter in base_parameters(model).items():
            parameter.requires_grad_(chosen.trains.get(key, parameter.requires_grad))

    def check_places(self, names: Iterable[str]) -> None:
        """Check that the places of some sets are as they were.

        Raises:
            AdapterError: There is no such set, or another module stands in a place.
        """
        for name in names:
            for target, _ in self.get(name).placed:
                module = getattr(target.parent, target.attribute, None)
                if (module.pretrained() if isinstance(module, AdapterModule) else module) is not target.module:
                    raise AdapterError(
                        f"{target.name!r} is another module now than when {name!r} adapted it; attach anew"
                    )


def rejoin(model: nn.Module, placed: Iterable[tuple[Target, AdapterModule]]) -> None:
    """Prepare adapters that were out of the model for their places."""
    anywhere = next((p.device for p in model.parameters()), None)
    for target, adapter in placed:
        tensor = next((t for m in (target.module, target.parent) for t in m.parameters()), None)
        adapter.rejoin(anywhere if tensor is None else tensor.device)
        fit_in(adapter, target)


def sets_of(model: nn.Module) -> AdapterSets:
    """The adapters of a model, by name; it may have none."""
    sets: AdapterSets = inner(model).__dict__.get(SETS, AdapterSets())
    return sets


@contextmanager
def room_for(model: nn.Module, name: str) -> Iterator[AdapterSets]:
    """Inside the block the model has no adapters, so that a set called `name` can be attached; as before on an error.

    Raises:
        AdapterError: `name` is taken or no name, or the adapters in the model cannot be taken out.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name {name!r} must be a text, such as 'german'")
    sets = sets_of(model)
    foreign = not is_in_use(model) and any(True for _ in adapters(model))
    if name in sets.by_name or foreign or (is_in_use(model) and not sets.by_name):
        raise AdapterError(
            f"{type(model).__name__} already has adapters (merged ones count while their wrappers stay); "
            "call lit_adapters.detach or lit_adapters.merge first, give all methods to one attach, or give these "
            "another name"
        )
    before = attachment(model).names if is_in_use(model) else ()
    sets.take_out(model)
    present = tensors_of(model, sets.originals)
    install(model, sets.originals)
    model.__dict__[SETS] = sets
    try:
        yield sets
    except BaseException:
        install(model, sets.originals | present)
        if before:
            sets.put_in(model, before[0])
        if not sets.by_name:
            sets.forget(model)
        raise


def tensors_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and buffers that stand in the model under some names."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: found[name] for name in names}


@torch.no_grad()
def install(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of others, on the device and in the dtype of those."""
    for name, tensor in tensors.items():
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        table = module._parameters if key in module._parameters else module._buffers
        present = table[key]
        if present is not None and (tensor.device != present.device or tensor.dtype != present.dtype):
            tensor.data = tensor.data.to(present.device, present.dtype)
        table[key] = tensor  # type: ignore[assignment]
