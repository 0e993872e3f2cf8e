"""Which modules of a model a method adapts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lit_adapters.activations import is_known_activation
from lit_adapters.errors import TargetsNotFound
from lit_adapters.layout import is_linear, is_pointwise_conv
from lit_adapters.methods.base import AdapterModule, Method

# Parts of a name that mark an activation as something else than an MLP's: reached by naming them in `targets`.
_NOT_MLP = re.compile(
    r"(^|\.)(pooler|attn_pool|stem|patch_embed|head|head_\w+|fc_norm|cls|classifier|score|lm_head|predictions|"
    r"pre_logits|gate|se|router|time_embed\w*)(\.|$)"
)
_MLP_NAME = re.compile(r"(mlp|ffn|feed_?forward|intermediate)$", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One place in a model: `parent.attribute` is `module`."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module


def places(model: nn.Module) -> Iterator[Target]:
    """Every place that holds a module, once for each (parent, attribute); a shared module appears at all its places."""
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
    """A list holds name suffixes (whole dotted parts), a string is a regular expression for the whole name."""
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in spec)


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The prediction heads by timm's `get_classifier()` or transformers' `get_output_embeddings()`; may be empty."""
    for getter in ("get_classifier", "get_output_embeddings"):
        if callable(getattr(model, getter, None)):
            found = getattr(model, getter)()
            heads = list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else [found]
            return [h for h in heads if isinstance(h, nn.Module) and not isinstance(h, nn.Identity)]
    return []


def _all_linear(model: nn.Module) -> Callable[[Target], bool]:
    heads = {id(m) for head in head_modules(model) for m in head.modules()}
    # nn.MultiheadAttention reads the weight of its output projection without calling the layer.
    return lambda t: (
        isinstance(t.module, nn.Linear)
        and id(t.module) not in heads
        and not isinstance(t.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def _activations(model: nn.Module) -> Callable[[Target], bool]:
    heads = {id(m) for head in head_modules(model) for m in head.modules()}

    def selected(t: Target) -> bool:
        if not is_known_activation(t.module) or _NOT_MLP.search(t.name) or id(t.module) in heads:
            return False
        return any(is_linear(m) or is_pointwise_conv(m) for m in t.parent.children())

    return selected


def find_targets(model: nn.Module, method: Method, train: str | Sequence[str] = ()) -> list[Target]:
    """The places of `model` that `method` adapts; modules in a `train` list or in the method's `exclude` are left out.

    Raises:
        TargetsNotFound: nothing matches; the message lists the nearest names and, for activations, the MLPs that call
            a function in place of a module.
    """
    keywords = {"all-linear": _all_linear, "activations": _activations}
    spec = method.targets
    if isinstance(spec, str) and spec in keywords:
        wanted = keywords[spec](model)
        # A list names particular modules, such as a head that no getter tells of; a regular expression may mean all.
        named = () if isinstance(train, str) else tuple(train)
        trained = [t.name for t in places(model) if matches(t.name, named)]

        def selected(t: Target) -> bool:
            return wanted(t) and not any(t.name == n or t.name.startswith(f"{n}.") for n in trained)
    else:

        def selected(t: Target) -> bool:
            return matches(t.name, spec)

    found = [t for t in places(model) if selected(t) and not matches(t.name, tuple(method.exclude))]
    if not found:
        raise TargetsNotFound(_nothing_found(model, method))
    return found


def _nothing_found(model: nn.Module, method: Method) -> str:
    spec = method.targets
    message = f"{type(method).__name__}: targets {spec!r} match no module of {type(model).__name__}."
    candidates = [
        t.name
        for t in places(model)
        if (is_known_activation(t.module) if method.kind == "activation" else isinstance(t.module, nn.Linear))
    ]
    if spec == "activations":
        functional = [
            f"{name} ({type(m).__name__})"
            for name, m in model.named_modules()
            if _MLP_NAME.search(name) and not any(is_known_activation(c) for c in m.children())
        ]
        if functional:
            message += f" These blocks call their activation as a function, not as a module: {_few(functional)}."
    wanted = [spec] if isinstance(spec, str) else list(spec)
    names = [t.name for t in places(model)]
    tails = {n.rpartition(".")[2] for n in names}
    near = [n for w in wanted for n in difflib.get_close_matches(w, [*names, *tails], n=3, cutoff=0.5)]
    if near:
        message += f" Near misses: {_few(list(dict.fromkeys(near)))}."
    if candidates:
        message += f" Modules it could adapt if named: {_few(candidates)}."
    elif not any(isinstance(m, AdapterModule) for m in model.modules()):
        message += " The model has no module of a kind that this method adapts."
    return message


def _few(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
