"""Which modules of a model a method adapts, and at which places in the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lit_adapters.activations import is_known_activation
from lit_adapters.errors import TargetsNotFound
from lit_adapters.methods.channels import is_linear, is_pointwise_conv
from lit_adapters.methods.matrix_layers import is_plain
from lit_adapters.methods.patterns import fullmatch

# Parts of a name of activations outside MLPs. Naming such an activation in `targets` adapts it all the same.
_NOT_MLP = re.compile(
    r"(^|\.)(pooler\w*|attn_pool|stem|patch_embed|head|head_\w+|\w+_head|fc_norm|cls|classifier|score|predictions|"
    r"pre_logits|sequence_summary|gate|se|router|time_embed\w*)(\.|$)"
)
_PEFT_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_GATE_CLASS = re.compile(r"Squeeze|Excit|^SE|Gather")
_MLP_NAME = re.compile(r"(mlp|ffn|feed_?forward|intermediate)$", re.IGNORECASE)


class Selection(Protocol):
    """The fields of a method that select targets; `lit_adapters.methods.method.Method` explains them."""

    @property
    def kind(self) -> str:
        """What the method adapts: "linear" or "activation"."""

    @property
    def targets(self) -> str | Sequence[str]:
        """A keyword, a list of name suffixes, or a regular expression for whole names."""

    @property
    def exclude(self) -> Sequence[str]:
        """Name suffixes of modules to leave alone."""


@dataclass(frozen=True)
class Target:
    """One place in a model, where `parent.attribute` is `module`.

    Attributes:
        name: The qualified name of the module at this place.
        parent: The module that holds it.
        attribute: Its name in the parent.
        module: The module itself.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module


def places(model: nn.Module) -> Iterator[Target]:
    """Every place of a model, once for each (parent, attribute); a shared module appears at all its places."""
    seen: set[tuple[int, str]] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if (id(parent), attribute) not in seen:
            seen.add((id(parent), attribute))
            yield Target(name, parent, attribute, module)


def matches(name: str, spec: str | Sequence[str]) -> bool:
    """Whether a name matches.

    Args:
        name: The qualified name of a module or parameter.
        spec: A list of name suffixes (whole dotted parts), or a string, a regular expression for the whole name.

    Raises:
        AdapterError: The string is not a regular expression.
    """
    if isinstance(spec, str):
        return fullmatch(spec, name)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in spec)


def exactly(names: list[str], model: nn.Module) -> list[str] | str:
    """A specification that selects these modules and no others; peft and `attach` read it alike.

    It is the list of names, or a regular expression where a name is also the end of another module's name.
    """
    others = {t.name for t in places(model)} - set(names)
    if any(matches(other, names) for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The prediction heads, by timm's `get_classifier()` or transformers' `get_output_embeddings()`; may be empty.

    The method may belong to a module inside `model`, such as a timm model inside a LightningModule.
    """
    heads: dict[int, nn.Module] = {}
    for module in model.modules():
        for getter in ("get_classifier", "get_output_embeddings"):
            found = getattr(module, getter)() if callable(getattr(module, getter, None)) else None
            for head in found if isinstance(found, (list, tuple, nn.ModuleList)) else [found]:
                if isinstance(head, nn.Module) and not isinstance(head, nn.Identity):
                    heads[id(head)] = head
    return list(heads.values())


def _parts_of_peft(model: nn.Module) -> dict[str, nn.Module]:
    """What peft's layers hold besides the layer that they adapt, by name; recognised without importing peft."""
    return {
        f"{name}.{child}": part
        for name, module in model.named_modules()
        if any(
            kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.") for kind in type(module).__mro__
        )
        for child, part in module.named_children()
        if child != "base_layer"
    }


def peft_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters of adapters of peft."""
    return [f"{name}.{p}" for name, part in _parts_of_peft(model).items() for p, _ in part.named_parameters()]


def _all_linear(model: nn.Module) -> Callable[[Target], bool]:
    heads = {id(m) for head in head_modules(model) for m in head.modules()}
    parts = {id(m) for part in _parts_of_peft(model).values() for m in part.modules()}
    # nn.MultiheadAttention reads the weight of its output projection without calling the layer.
    return lambda t: (
        is_linear(t.module)
        and is_plain(t.module)
        and id(t.module) not in heads
        and id(t.module) not in parts
        and not isinstance(t.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def _activations(model: nn.Module) -> Callable[[Target], bool]:
    heads = {id(m) for head in head_modules(model) for m in head.modules()}

    def selected(t: Target) -> bool:
        if not is_known_activation(t.module) or _NOT_MLP.search(t.name) or id(t.module) in heads:
            return False
        if _GATE_CLASS.search(type(t.parent).__name__):
            return False
        return any((is_linear(m) or is_pointwise_conv(m)) and id(m) not in heads for m in t.parent.children())

    return selected


KEYWORDS = {"all-linear": _all_linear, "activations": _activations}


def find_targets(
    model: nn.Module,
    method: Selection,
    train: str | Sequence[str] = (),
    wanted: Callable[[Target], bool] | None = None,
    also: Sequence[str] = (),
) -> list[Target]:
    """The places of `model` that `method` adapts.

    Args:
        model: The model.
        method: What to adapt; modules in its `exclude` are left out.
        train: As for `lit_adapters.attach`; where `targets` is a keyword, modules in this list are left out.
        wanted: Whether a place is selected, where `targets` is a keyword that this method alone has.
        also: Names of parameters that the method adapts besides, and that a name or pattern may mean.

    Raises:
        TargetsNotFound: `targets`, a name in a list of them, a suffix in `exclude` or a pattern in `rank_pattern`
            matches nothing. The message lists the nearest names and, for activations, the MLPs that call a function
            instead of a module.
    """
    spec = method.targets
    if wanted is None and isinstance(spec, str) and spec in KEYWORDS:
        wanted = KEYWORDS[spec](model)
    if wanted is not None:
        # A list names particular modules, such as a head of an unknown kind; a regular expression may match all.
        named = () if isinstance(train, str) else tuple(train)
        trained = [t.name for t in places(model) if matches(t.name, named)]

        def selected(t: Target) -> bool:
            return wanted(t) and not any(t.name == n or t.name.startswith(f"{n}.") for n in trained)
    else:

        def selected(t: Target) -> bool:
            return matches(t.name, spec)

    names = [t.name for t in places(model)]
    parameters = [name for name, _ in model.named_parameters()]
    for suffix in method.exclude:
        if not any(matches(name, [suffix]) for name in (*names, *parameters)):
            raise TargetsNotFound(
                f"{type(method).__name__}: exclude {suffix!r} matches no module of {type(model).__name__}."
                f"{near_misses([suffix], names)}"
            )
    found = [t for t in places(model) if selected(t) and not within(t.name, tuple(method.exclude))]
    if not found and not also:
        raise TargetsNotFound(_nothing_found(model, method))
    for suffix in () if wanted is not None or isinstance(spec, str) else spec:
        if not any(matches(name, [suffix]) for name in (*names, *also)):
            raise TargetsNotFound(_unmatched(model, method, suffix))
    for pattern in getattr(method, "rank_pattern", None) or {}:
        adapted = [*(t.name for t in found), *also]
        if not any(fullmatch(pattern, name) for name in adapted):
            raise TargetsNotFound(
                f"{type(method).__name__}: rank_pattern {pattern!r} matches none of its {len(adapted)} layers, such as "
                f"{adapted[0]!r}; it is a regular expression for the whole name"
            )
    return found


def matched_names(model: nn.Module, spec: Sequence[str]) -> list[str]:
    """The names of a list of targets that match a module of `model`."""
    names = [t.name for t in places(model)]
    return [suffix for suffix in spec if any(matches(name, [suffix]) for name in names)]


def left_alone(
    model: nn.Module, methods: Sequence[Selection], adapted: Collection[int], trained: Collection[str]
) -> list[str]:
    """The names of weights that "all-linear" does not reach, and of parameters with a name of a list of targets.

    Embeddings, heads, vectors, and what is excluded or trains are not meant. Experts that are one parameter of three
    dimensions are, and so are convolutions.

    Args:
        model: Without adapters.
        methods: What is attached.
        adapted: The ids of the parameters of adapted layers.
        trained: The names of the base parameters that train.
    """
    lists = [m.targets for m in methods if not isinstance(m.targets, str)]
    every = [m for m in methods if m.targets == "all-linear"]
    apart = {id(p) for head in head_modules(model) for p in head.parameters()}
    apart |= {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    left = []
    for name, parameter in model.named_parameters():
        excluded = name in trained or any(within(name, tuple(m.exclude)) for m in methods)
        if excluded or id(parameter) in adapted or id(parameter) in apart:
            continue
        matrix = parameter.dim() > 1 and parameter.shape[0] > 1  # and no table of positions
        if (every and matrix) or any(matches(name, spec) for spec in lists):
            left.append(name)
    return left


def within(name: str, suffixes: Sequence[str]) -> bool:
    """Whether one of `suffixes` matches the module called `name` or a module that contains it."""
    parts = name.split(".")
    return any(matches(".".join(parts[: i + 1]), suffixes) for i in range(len(parts)))


def _nothing_found(model: nn.Module, method: Selection) -> str:
    spec = method.targets
    message = f"{type(method).__name__}: targets {spec!r} match no module of {type(model).__name__}."
    candidates = [
        t.name
        for t in places(model)
        if (is_known_activation(t.module) if method.kind == "activation" else is_linear(t.module))
    ]
    if spec == "activations":
        functional = [
            f"{name} ({type(m).__name__})"
            for name, m in model.named_modules()
            if _MLP_NAME.search(name) and not any(is_known_activation(c) for c in m.children())
        ]
        if functional:
            message += (
                f" These blocks hold no known activation module of their own (they call a function, or keep it "
                f"elsewhere): {_few(functional)}."
            )
    if parameters := parameters_called(spec, model):
        return f"{message} {parameters}."
    message += near_misses(spec, [t.name for t in places(model)])
    if candidates:
        message += f" Modules it could adapt if named: {_few(candidates)}."
    else:
        message += " The model has no module of a kind that this method adapts."
    return message


def _unmatched(model: nn.Module, method: Selection, suffix: str) -> str:
    """What is wrong with one name of a list of targets, of which others match."""
    head, names = f"{type(method).__name__}: {suffix!r} in targets", [t.name for t in places(model)]
    parameters = parameters_called([suffix], model)
    if parameters:
        return f"{head} names no module. {parameters}"
    return (
        f"{head} matches no module of {type(model).__name__}.{near_misses([suffix], names)} Correct it or take it out"
    )


def parameters_called(spec: str | Sequence[str], model: nn.Module) -> str:
    """A sentence for an error message: `spec`, which matches no module, matches parameters; empty if it does not."""
    found = [(name, p) for name, p in model.named_parameters() if matches(name, spec)]
    if not found:
        return ""
    name, parameter = found[0]
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    size = " x ".join(map(str, parameter.shape))
    return (
        f"{name!r} is a parameter ({size}) of {owner}, and not a module: adapters go around modules. Take it out of "
        f"targets; to train such parameters whole, name them in `train`"
    )


def near_misses(spec: str | Sequence[str], names: Sequence[str]) -> str:
    """A sentence for an error message: names close to `spec`, which matches none of `names`; empty if there is none."""
    if isinstance(spec, str) and any(matches(name, [spec]) for name in names):
        return f" A string is a regular expression for the whole name; write [{spec!r}] for a suffix."
    wanted = [spec] if isinstance(spec, str) else list(spec)
    tails = sorted({n.rpartition(".")[2] for n in names})
    near = [n for w in wanted for n in difflib.get_close_matches(w, [*names, *tails], n=3, cutoff=0.5)]
    return f" Near misses: {_few(list(dict.fromkeys(near)))}." if near else ""


def _few(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
