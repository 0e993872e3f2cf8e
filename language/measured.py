"""What a model does with its inputs, found by measuring: neither its class nor its configuration tells.

A measurement takes a few forward passes over a dozen tokens, once for each model. It changes nothing: neither the
model's mode nor random states, and hooks that watch adapters do not see it.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language.models import context_length, vocabulary_size
from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.model.modes import evaluating
from lit_adapters.model.sharding import is_sharded

_TOKENS = 8  # of a document that is read for a measurement
_MOVED = 1e-5  # nats that the losses of a document may move by, where nothing is rounded differently
_FULL = (torch.float32, torch.float64)  # all other dtypes are of low precision

_known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

T = TypeVar("T")


def measured(model: nn.Module, measure: Callable[[Any], T]) -> T:
    """What `measure(model)` returns, measured once for a model and its implementation of attention.

    Args:
        model: A transformers causal language model, compiled or not.
        measure: Makes forward passes of the model that it is given, in eval mode.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    known = _known.setdefault(model, {})
    key = measure, getattr(model.config, "_attn_implementation", None)
    if key not in known:
        with _unnoticed(model):
            known[key] = measure(model)
    result: T = known[key]
    return result


def check_packing(model: nn.Module) -> None:
    """Check that documents of a packed row do not see each other and count their positions from 0.

    Architectures differ in what they do with `position_ids`: some have no use for them (BLOOM, MPT, Mamba), some take
    them for the positions alone (OPT), and some carry a state or a convolution over from one document to the next.

    Raises:
        AdapterError: The losses of a document depend on the one before it, or are not those of the document alone.
    """
    fault = measured(model, _packing_fault)
    if fault is not None:
        name = type(getattr(model, "_orig_mod", model)).__name__
        raise AdapterError(
            f"packed documents do not stay apart in {name}: {fault}. Set data.packing to buckets, which pads "
            "documents of similar length, or to none"
        )


def check_causal(model: nn.Module) -> None:
    """Check that a token is predicted from those before it alone.

    Raises:
        AdapterError: Logits depend on later tokens, as those of BERT without `is_decoder` do: the model would see the
            answer that it is to learn.
    """
    if not measured(model, _is_causal):
        raise AdapterError(
            f"{type(model).__name__} predicts a token from those after it, too, and would see what it is to learn: "
            "choose a decoder, or set is_decoder in the model's configuration if it has this option"
        )


def check_finite(model: nn.Module, logits: Tensor) -> None:
    """Check that logits (..., V) are those of a distribution; -inf only forbids a token.

    Raises:
        AdapterError: One of them is NaN or inf, or all are -inf.
    """
    if torch.isfinite(logits.float().logsumexp(-1)).all():
        return
    broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    reason = "its weights are too large" if broken is None else f"the parameter {broken!r} is not finite"
    raise AdapterError(
        f"the output of {type(model).__name__} is not a number: {reason}. Use whole weights, or those of an earlier "
        "checkpoint"
    )


def ignores_left_padding(model: nn.Module) -> bool:
    """Whether rows that are padded on the left, with a mask and positions, give the logits of the rows alone."""
    return measured(model, _ignores_left_padding)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether logits or their logarithms of softmax differ by rounding only, in the precision they were computed in."""
    tolerance = 1e-3 if found.dtype in _FULL else 0.15
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= tolerance * (expected.double() - expected.double().mean()).norm())


def documents(model: Any, *lengths: int) -> list[Tensor]:
    """Documents of different tokens without special ones, int64 (1, length) on the model's device."""
    special = [getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special += [token for tokens in special if isinstance(tokens, list) for token in tokens]
    order = torch.randperm(vocabulary_size(model), generator=torch.Generator().manual_seed(0))[:1024].tolist()
    tokens = [token for token in order if token not in special] or order
    repeated = torch.tensor(tokens, device=_device(model)).repeat(sum(lengths) // len(tokens) + 1)
    return [row[None] for row in repeated[: sum(lengths)].split(lengths)]


def _packing_fault(model: Any) -> str | None:
    """What is wrong with packed rows, as a part of a sentence; None where nothing is."""
    size = max(2, min(_TOKENS, (context_length(model) or 2 * _TOKENS) // 2))
    first, other, second = documents(model, size, size, size)
    place = torch.arange(size, device=first.device)[None]

    def losses(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(
            input_ids=torch.cat([before, after], 1),
            attention_mask=None,
            position_ids=torch.cat([place, place], 1),
            use_cache=False,
        ).logits
        return _losses(logits[:, :size], before), _losses(logits[:, size:], after)

    try:
        packed = losses(first, second)
        moved = float((losses(other, second)[1] - packed[1]).abs().max())
    except (TypeError, ValueError) as error:
        return f"it does not read rows with position_ids and without a mask ({type(error).__name__}: {error})"
    alone = model(input_ids=second, attention_mask=torch.ones_like(second), use_cache=False).logits
    check_finite(model, alone)
    full = alone.dtype in _FULL
    if not moved <= _MOVED:
        # Experts and low precision round a row differently with what else is in it. A document never depends on the
        # one after it, so what moves its losses then is rounding.
        rounding = float((losses(first, other)[0] - packed[0]).abs().max())
        if not moved <= min(4 * rounding, 1e-3 if full else 0.2):
            return f"the losses of a document move by {moved:.2g} when the document before it is exchanged"
    differ = float((packed[1] - _losses(alone, second)).abs().max())
    if not differ <= (1e-4 * max(1.0, float(packed[1].max())) if full else 0.3):
        return f"the losses of a document differ by {differ:.2g} from those of the document alone"
    return None


def _is_causal(model: Any) -> bool:
    size = min(_TOKENS, context_length(model) or _TOKENS)
    half = max(1, size // 2)
    start, one, other = documents(model, half, half, half)
    rows = [torch.cat([start, end], 1)[:, :size] for end in (one, other)]
    logits = [model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits for row in rows]
    check_finite(model, logits[0])
    return alike(logits[0][:, :half], logits[1][:, :half])


def _ignores_left_padding(model: Any) -> bool:
    size = min(_TOKENS, context_length(model) or _TOKENS)
    gap = min(3, size - 1)
    # Padding of usual tokens: the embedding of the padding token is often 0.
    padding, short, long = documents(model, gap, size - gap, size)
    ids = torch.cat([torch.cat([padding, short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :gap] = 0
    try:
        padded = model(input_ids=ids, use_cache=False, **left_padded(model, mask, size)).logits
    except (TypeError, ValueError):
        return False
    alone = model(input_ids=short, attention_mask=mask[1:, gap:], use_cache=False).logits
    check_finite(model, alone)
    return alike(padded[:1, gap:], alone)


def left_padded(model: nn.Module, mask: Tensor, length: int) -> dict[str, Tensor]:
    """The mask of rows that are padded on the left, and the positions of the last `length` of their tokens.

    Args:
        model: The model; positions are left out where it does not take any.
        mask: 1 for tokens and 0 for padding, int64 (rows, tokens so far).
        length: Tokens that are read now.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    given = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    return {"attention_mask": mask, **given}


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each token but the first, float32 (tokens - 1,)."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs; those of an offloaded model are moved by its hooks."""
    found = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(found, torch.device("cpu"))


@contextmanager
def _unnoticed(model: nn.Module) -> Iterator[None]:
    device = _device(model)
    # A compiled model would be compiled once more, for rows that never come again. Importing dynamo takes seconds.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.no_grad(), evaluating(model), eager, random, _unwatched(model):
        yield


@contextmanager
def _unwatched(model: nn.Module) -> Iterator[None]:
    """Without the hooks of adapters inside the block; those of a sharded model put its parameters together."""
    if is_sharded(model):
        yield
        return
    watched = [module for module in model.modules() if isinstance(module, AdapterModule)]
    kept = [(module._forward_pre_hooks, module.on_read) for module in watched]
    for module in watched:
        module._forward_pre_hooks, module.on_read = OrderedDict(), None
    try:
        yield
    finally:
        for module, (hooks, on_read) in zip(watched, kept, strict=True):
            module._forward_pre_hooks, module.on_read = hooks, on_read
