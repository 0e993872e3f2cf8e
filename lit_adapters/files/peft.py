"""LoRA and DoRA to and from directories of the peft library; `files/peft_lora.py` says what those hold.

The format knows LoRA and DoRA alone, so that this file asks for their classes, as no other outside `methods/` does.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.atomic import write_together
from lit_adapters.files.base_name import base_name
from lit_adapters.files.peft_lora import CONFIG, LAYER_KEY, PREFIX, TENSORS, read_lora
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.methods.biased import BiasedAdapter
from lit_adapters.methods.dora import DoRA, DoRAAdapter
from lit_adapters.methods.lora import LoRA, LoRAAdapter
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.method import to_methods
from lit_adapters.methods.peft import require_peft
from lit_adapters.methods.targets import exactly, places
from lit_adapters.model.attach import attach, detach
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.record import adapters, attachment, inner, unfrozen
from lit_adapters.model.report import AdapterReport
from lit_adapters.model.sharding import refuse_sharded

# The ends of names under which peft looks for the head of a task, to train it whole.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def export_peft(model: nn.Module, directory: str | Path, tokenizer: Any = None) -> None:
    """Write LoRA, DoRA or AFA-LoRA at beta = 0 for `peft.PeftModel.from_pretrained(base_model, directory)` to load.

    A start that is subtracted (`start` of LoRA and DoRA) makes the pair of a layer twice as wide in the file.
    Modules of `train`, and those that were unfrozen after `attach`, are written as modules_to_save, and so are
    normalisations with running statistics, which move while the model trains. peft gets a copy for each module of a
    tied weight. Each file is replaced atomically. Where the model tells the name of its base on the hub and its task,
    they are written, so that `peft.AutoPeftModelForCausalLM` finds the base; the task of a classification only where
    its head trains, as peft would expect the head in the file. `lit_adapters.to_lora` makes LoRA of other
    methods first.

    Args:
        model: The module given to `attach`.
        directory: Where to; created if missing.
        tokenizer: One of transformers, to be saved beside the adapters.

    Raises:
        AdapterError: Peft is missing, or its format cannot express the model: another method, LoRA beside DoRA, AFA
            before beta = 0, a merged adapter, an adapted or trained layer that stands at several places, names that
            peft would confuse, or a sharded model. Nothing is written then.
    """
    model = inner(model)
    peft, state = require_peft(), attachment(model)
    refuse_sharded(model, "export_peft")
    require_loaded(model, "export_peft")
    found = {name: check_expressible(name, adapter) for name, adapter in adapters(model)}
    if not found:
        raise AdapterError("the model has no adapters: peft has no format for modules of `train` alone")
    dora = {name for name, adapter in found.items() if isinstance(adapter, DoRAAdapter)}
    if dora and len(dora) < len(found):
        other = next(n for n in found if n not in dora)
        raise AdapterError(f"a peft directory holds DoRA or LoRA: {min(dora)!r} has DoRA, {other!r} has not")
    positions = Counter(id(t.module) for t in places(model))
    if shared := [name for name, adapter in found.items() if positions[id(adapter)] > 1]:
        raise AdapterError(f"{shared[0]!r} stands at several places, and peft would adapt it at one of them")
    saved = _modules_to_save(model, _all_names(model, [*state.trained_parameters, *unfrozen(model)]), found)
    if shared := [name for name in saved if any(positions[id(m)] > 1 for m in model.get_submodule(name).modules())]:
        raise AdapterError(f"{shared[0]!r} trains and stands at several places, and peft would train it at one of them")
    methods = [m for method in to_methods(state.methods) for m in method.parts() if isinstance(m, LowRank)]
    dropouts = {adapter.dropout for adapter in found.values()}
    if len(dropouts) > 1:
        raise AdapterError(f"peft has one lora_dropout for all layers, and these have {sorted(dropouts)}")
    rslora = all(m.rslora for m in methods)
    alphas = {name: _alpha(adapter, methods, rslora) for name, adapter in found.items()}
    ranks = {name: adapter.update_rank for name, adapter in found.items()}
    (rank, _), (alpha, _) = (Counter(v).most_common(1)[0] for v in (ranks.values(), alphas.values()))
    base = base_name(model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropouts.pop(),
        # peft matches a pattern against any end of a name; the anchor leaves only the whole name.
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        use_rslora=rslora,
        use_dora=bool(dora),
        fan_in_fan_out=any(type(a.base).__name__ == "Conv1D" for a in found.values()),
        modules_to_save=saved or None,
        inference_mode=True,
        base_model_name_or_path=base.get("name"),
        revision=base.get("revision"),
        task_type=_task(model, base.get("task"), saved),
    )
    config.target_modules = exactly(list(found), model)  # set here, it stays a list, of one order
    _check_rewriting(config, model)
    tensors = {f"{name}.{key}": t for name, a in found.items() for key, t in pair_tensors(a).items()}
    tensors |= {f"{name}.{key}": t for name in saved for key, t in model.get_submodule(name).state_dict().items()}
    tensors = {f"{PREFIX}{key}": t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise AdapterError(f"{broken[0]!r} is not finite; nothing was written to {directory}")
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        text = Path(scratch, CONFIG).read_text(encoding="utf-8")
    directory = Path(directory)
    write_together(
        directory,
        {
            TENSORS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
        withdraw=[CONFIG],  # an interrupted export must not pair new tensors with an old one
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _task(model: nn.Module, task: str | None, saved: list[str]) -> str | None:
    """The task for the configuration; None where peft would look in the file for a head that did not train."""
    heads = [name for name, _ in model.named_modules() if name.endswith(_HEADS.get(task or "", ()))]
    return task if all(_inside(f"{name}.", saved) for name in heads) else None


def check_expressible(name: str, adapter: Any) -> LowRankAdapter:
    """The adapter, if peft has a layer of the same function.

    Raises:
        AdapterError: Peft has no layer with this adapter's function, or the adapter is nonlinear or merged now.
    """
    if not isinstance(adapter, (LoRAAdapter, DoRAAdapter, AFAAdapter)):
        raise AdapterError(f"{name!r} has {adapter.method}, which the LoRA format of peft cannot express")
    if isinstance(adapter, BiasedAdapter):
        raise AdapterError(f"{name!r} has a bias of BitFit, which `export_peft` does not write; train without BitFit")
    adapter.check_linear()
    if adapter.merged:
        raise AdapterError(f"{name!r} is merged; call lit_adapters.unmerge(model) before exporting")
    if adapter.read_as_weight:
        raise AdapterError(f"the parent of {name!r} reads its weight without calling it; peft's LoRA would do nothing")
    _check_convolution(name, adapter.base)
    return adapter


def _check_convolution(name: str, base: Any) -> None:
    dilated = any(d != 1 for d in getattr(base, "dilation", ()))
    if dilated or getattr(base, "padding_mode", "zeros") != "zeros":
        setting = f"dilation {base.dilation}" if dilated else f"padding_mode {base.padding_mode!r}"
        raise AdapterError(f"{name!r} has {setting}, which the convolutions of peft's LoRA do not follow")


def _alpha(adapter: LowRankAdapter, methods: list[LowRank], rslora: bool) -> float:
    """The alpha with which peft scales this layer as we do: one that was configured, or what the scaling asks for."""
    root = math.sqrt(adapter.update_rank) if rslora else adapter.update_rank
    exact = [m.alpha for m in methods if m.alpha / root == adapter.scaling]
    alpha = exact[0] if exact else adapter.scaling * root
    return int(alpha) if float(alpha).is_integer() else alpha


def pair_tensors(adapter: LowRankAdapter) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, in peft's shapes; its own, not copies, unless a start is subtracted."""
    a, b = adapter.right_factor(adapter.lora_A.dtype), adapter.left_factor(adapter.lora_B.dtype)
    shape = adapter._parameters["weight"].shape  # type: ignore[union-attr]
    ones = (1,) * (len(shape) - 2) if "kernel_size" in vars(adapter.base) else ()
    tensors = {"lora_A.weight": a.view(-1, *shape[1:]) if ones else a, "lora_B.weight": b.view(*b.shape, *ones)}
    if isinstance(adapter, DoRAAdapter):
        m = adapter.magnitude
        tensors["lora_magnitude_vector"] = m.view(1, -1, *ones) if ones else m
    return tensors


def _check_rewriting(config: Any, model: nn.Module) -> None:
    """Raise if peft takes the names of this architecture's layers for those of experts it once had."""
    rewritten = copy.deepcopy(config)
    with suppress(ImportError):  # an older peft, or an older transformers, rewrites nothing
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        try:
            convert_peft_config_for_transformers(rewritten, model, None)
        except ValueError as error:
            raise AdapterError(f"peft cannot adapt these layers of {type(model).__name__}: {error}") from error
    if rewritten.target_parameters:
        names = ", ".join(sorted(rewritten.target_parameters))
        raise AdapterError(f"in {type(model).__name__} peft would adapt the parameters {names} in place of some layers")


def _all_names(model: nn.Module, names: Collection[str]) -> set[str]:
    """The names of parameters with all other names of tied ones, as peft makes a copy of each module it trains."""
    chosen = {id(model.get_parameter(name)) for name in names}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen}


def _modules_to_save(model: nn.Module, trained: Collection[str], found: Collection[str]) -> list[str]:
    """The outermost modules of trained parameters, normalisations with statistics, and what peft takes for either."""
    modules, chosen = dict(model.named_modules(remove_duplicate=False)), list[str]()
    for name, module in modules.items():
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        statistics = isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        if name and (statistics or (own and all(key in trained for key in own))):
            chosen.append(name)
    chosen = _outermost(chosen)
    if partial := [key for key in trained if not _inside(key, chosen)]:
        raise AdapterError(f"{partial[0]!r} trains, but not all of its module, and peft saves whole modules")
    # peft takes every module whose name ends so, and keeps adapters away from whatever has the name as a part.
    chosen = _outermost([n for n in modules if any(n.endswith(end) for end in chosen)])
    for name in found:
        taker = [n for n in chosen if f"{name}.".startswith(f"{n}.") or re.match(rf"(^|.*\.){n}($|\..*)", name)]
        if taker:
            raise AdapterError(f"peft would take the adapted {name!r} for a trained module ({taker[0]!r}); rename one")
    return chosen


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not _inside(name, names)]


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def import_peft(model: nn.Module, directory: str | Path) -> AdapterReport:
    """Attach the LoRA or DoRA that peft saved to a fresh base model, and load its values; modules_to_save train.

    Where peft scales a layer by an alpha of its own, the factor goes into B.

    Args:
        model: The base model, without adapters.
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: Peft is missing; a file is missing or torn; a setting has no counterpart here; tensors are
            missing, unexpected, not finite or of another shape, or tied weights have two values. The model is then as
            before.
    """
    model, directory = inner(model), Path(directory)
    config, tensors = read_lora(directory)
    if any(p.is_meta for p in model.parameters()):
        raise AdapterError(f"{type(model).__name__} is on the meta device: load its weights before importing")
    modules = {t.name: t.module for t in places(model)}
    ranks = {m[1]: t.shape[0] for k, t in tensors.items() if (m := LAYER_KEY.fullmatch(k)) and m[2] == "lora_A.weight"}
    absent = [name for name in ranks if name not in modules]
    if absent or not ranks:
        adapted = f"adapts {shown(absent[0])}, which {type(model).__name__} has not" if absent else "adapts no layer"
        raise AdapterError(f"{directory} {adapted}; give the model that it was trained on")
    for name in ranks:
        _check_convolution(name, modules[name])

    from peft.utils.other import get_pattern_key

    rank_of: dict[str, Any] = config.rank_pattern or {}
    alpha_of: dict[str, Any] = config.alpha_pattern or {}
    alphas = {n: alpha_of.get(get_pattern_key(list(alpha_of), n), config.lora_alpha) for n in ranks}
    configured = {n: rank_of.get(get_pattern_key(list(rank_of), n), config.r) for n in ranks}
    for name in (n for n in ranks if ranks[n] != configured[n]):
        raise AdapterError(f"{directory}: {name!r} has rank {ranks[name]}, but {configured[name]} in {CONFIG}")
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], config.lora_alpha or max(alphas.values())
    method = (DoRA if config.use_dora else LoRA)(
        rank=rank,
        alpha=alpha,
        dropout=config.lora_dropout,
        targets=exactly(list(ranks), model),
        rank_pattern={re.escape(n): r for n, r in ranks.items() if r != rank} or None,
        rslora=config.use_rslora,
    )
    saved = _outermost([n for n in modules if any(n.endswith(end) for end in config.modules_to_save or ())])
    trained = [name for name in saved if next(modules[name].parameters(), None) is not None]
    report = attach(model, method, exactly(trained, model))
    try:
        own = {f"{n}.{key}": t for n, a in adapters(model) for key, t in pair_tensors(a).items()}  # type: ignore[arg-type]
        own |= {f"{n}.{key}": t for n in saved for key, t in model.get_submodule(n).state_dict().items()}
        _check_values(model, own, tensors, directory)
    except BaseException:
        detach(model)
        raise
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        for name in (n for n in alphas if alphas[n] != alpha):
            own[f"{name}.lora_B.weight"].mul_(alphas[name] / alpha)
    return report


def _check_values(model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Check that the saved tensors can take the places of the model's own.

    Raises:
        AdapterError: One is missing, unexpected, of another shape, of whole numbers or not finite; or tied weights of
            the model have two values.
    """
    wrong = [k for k in sorted(own.keys() | tensors.keys()) if _shape(own, k) != _shape(tensors, k)]
    if wrong:
        raise AdapterError(
            f"{directory} does not fit {type(model).__name__}: {wrong[0]!r} is {_shape(tensors, wrong[0])} there and "
            f"{_shape(own, wrong[0])} here ({len(wrong)} tensors differ)"
        )
    by_place: dict[int, str] = {}
    for key, tensor in own.items():
        saved = tensors[key]
        if saved.is_floating_point() != tensor.is_floating_point() or not saved.to(tensor.dtype).isfinite().all():
            raise AdapterError(
                f"{directory}: {key!r} is {saved.dtype} or not finite in {tensor.dtype}; take an undamaged copy"
            )
        first = by_place.setdefault(tensor.data_ptr(), key)
        if tensor.numel() and tensors[first].shape == saved.shape and not torch.equal(tensors[first], saved):
            raise AdapterError(
                f"{first!r} and {key!r} are tied in {type(model).__name__}, and {directory} has two values for them; "
                "build the model with tie_word_embeddings=False"
            )


def _shape(tensors: Mapping[str, Tensor], key: str) -> str:
    return "x".join(map(str, tensors[key].shape)) if key in tensors else "absent"
