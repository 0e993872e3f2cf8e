"""The configuration of an adapter method, and what reads one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_adapters.class_paths import build
from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.placeholder import plain_layers
from lit_adapters.methods.targets import Target, find_targets, matched_names
from lit_adapters.schedules import Schedule
from lit_adapters.values import list_of_names

Config = Mapping[str, Any]
Factory = Callable[[], "AdapterModule"]


class Method:
    """Base of the method configurations; each subclass is a dataclass.

    A plain class, because jsonargparse refuses `class_path` for subclasses of a dataclass.
    """

    name: ClassVar[str]  # in reports, tags and lr_scale
    kind: ClassVar[str]  # what it adapts: "linear", "activation", or "composition" of other methods
    merges: ClassVar[str] = "yes"  # whether `merge` folds it into weights, in a few words
    exports: ClassVar[str] = "no"  # whether `export_peft` can write it
    targets: str | Sequence[str]
    exclude: Sequence[str]

    def parts(self) -> list[Method]:
        """The single methods this one is composed of."""
        return [self]

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """The places of `model` that this method adapts, and what builds the adapter of each.

        The model stays as it is: `attach` puts the adapters in.

        Args:
            model: Without adapters.
            train: As given to `attach`; a keyword in `targets` leaves modules of a `train` list out.

        Raises:
            TargetsNotFound: Nothing matches.
        """
        return [(t, partial(self.wrap, t.module, t.name, t.parent)) for t in find_targets(model, self, train)]

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> AdapterModule:
        """The adapter around one layer.

        Args:
            base: The layer.
            qualified_name: Its name in the model.
            parent: The module that holds it.

        Raises:
            AdapterError: This layer cannot carry the method; the message names the layer and the fix.
        """
        raise AdapterError(f"{type(self).__name__} is a composition of methods; attach it to a model instead")

    def extend(self, adapter: AdapterModule) -> AdapterModule | None:
        """Add this method to the adapter of another one, for a layer that both want; None, the default, if it cannot.

        Args:
            adapter: Freshly built by the other method; it may become the result.
        """
        return None

    def forget_unmatched(self, model: nn.Module) -> None:
        """Take names that match nothing out of a list of targets; files of earlier versions may hold such names."""
        if not isinstance(self.targets, str):
            self.targets = matched_names(model, self.targets) or self.targets

    def follow_file(self, model: nn.Module, adapted: Collection[str]) -> None:
        """Choose no more layers than a file holds, where `targets` has come to mean more since it was written.

        Args:
            model: Without adapters.
            adapted: The names of the layers in the file.
        """
        self.forget_unmatched(model)

    def check_merge(self, model: nn.Module, merged: Sequence[str]) -> None:
        """Called by `lit_adapters.merge` before a final merge changes anything; most methods need nothing.

        Args:
            model: With its adapters.
            merged: Names of all layers that will be merged, of this method and of others.

        Raises:
            AdapterError: The merged model could not be saved and loaded again.
        """

    def finish_merge(self, model: nn.Module, merged: Sequence[str]) -> None:
        """Called by `lit_adapters.merge` when the layers named `merged` hold the effect; most methods need nothing.

        A method that adds parameters to layers states them here in the model's configuration, so that a saved model
        loads again.
        """

    def join(self, adapters: Mapping[str, AdapterModule]) -> None:
        """Called when `placeholder` has built all adapters of a file and they hold their tensors.

        Most methods need nothing; one whose layers share tensors gives them here to the layers that do not hold them.

        Args:
            adapters: Those of this method, by qualified name.

        Raises:
            AdapterError: A shared tensor is missing.
        """

    def normalise_targets(self) -> None:
        """Give `targets` and `exclude` one form, so that a method equals its round trip through YAML or JSON.

        Raises:
            AdapterError: `targets` is neither a text nor a list of names, or `exclude` is no list of names.
        """
        if isinstance(self.exclude, str):
            raise AdapterError(
                f"exclude {shown(self.exclude)} must be a list of name suffixes: [{shown(self.exclude)}]"
            )
        if not isinstance(self.targets, (str, Iterable)):
            raise AdapterError(
                f"targets {shown(self.targets)} must be a keyword, a regular expression or a list of suffixes"
            )
        if not isinstance(self.targets, str):
            self.targets = list_of_names("targets", self.targets)
        self.exclude = list_of_names("exclude", self.exclude)

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
        AdapterError: Something else was given, or a class path that is not a method of a module that has been imported.
    """
    if methods is None:
        return []
    if isinstance(methods, (Method, Mapping)):
        methods = [methods]
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise AdapterError(f"adapters must be a Method, its {{class_path, init_args}} or a list, not {shown(methods)}")
    return [m if isinstance(m, Method) else build(m, Method, "lit_adapters", "adapter method") for m in methods]
