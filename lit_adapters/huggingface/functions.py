"""Saves transformers models with learned activations so that `from_pretrained` loads them without this library."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import CONFIG_NAME

from lit_adapters.activations import LEARNED_ACTIVATIONS, AffineActivation, RationalActivation
from lit_adapters.errors import AdapterError
from lit_adapters.huggingface import remote_model
from lit_adapters.model.record import adapters

MODULE = "modeling_learned_activations"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_AUTO_CLASSES = [name for name in dir(transformers) if name.startswith("AutoModel")]


def save_with_functions(model: Any, directory: str | Path, **kwargs: Any) -> None:
    """Write a merged model whose learned activations stay, such as NoRA's, as a directory of transformers.

    It is loaded by `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`, or by the Auto class of
    the model's kind. A small Python file in the directory has the formulas; it needs transformers and torch alone.
    Without `trust_remote_code` transformers refuses the directory, because it does not know its `model_type`.
    Coefficients stay in float32 whatever the dtype of the weights.

    Args:
        model: A model of a class of transformers, after `lit_adapters.merge`.
        directory: Where to; created if missing.
        **kwargs: For `save_pretrained`, such as `max_shard_size`.

    Raises:
        AdapterError: `push_to_hub` is among the arguments; the model still has adapters, has no learned activation, or
            is of a class outside transformers or of a class that no Auto class loads.
    """
    directory = Path(directory)
    attached = next((name for name, _ in adapters(model)), None)
    if attached is not None:
        raise AdapterError(f"{attached!r} has an adapter; call lit_adapters.merge(model) first")
    functions = {name: _settings(m) for name, m in model.named_modules() if isinstance(m, LEARNED_ACTIVATIONS)}
    if not functions:
        raise AdapterError("the model has no learned activations; save_pretrained saves it")
    kind = type(model)
    source = _source(model)
    auto = _auto_classes(kind, type(model.config))
    if kwargs.get("push_to_hub"):
        raise AdapterError("save_with_functions writes a directory; upload that with huggingface_hub's upload_folder")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as place:
        scratch = Path(place)
        # Under the model's own names: those of older checkpoints would be undone for classes of transformers alone.
        kind.save_pretrained(model, scratch, **kwargs, save_original_format=False)
        (scratch / f"{MODULE}.py").write_text(source, encoding="utf-8")
        config = json.loads((scratch / CONFIG_NAME).read_text(encoding="utf-8"))
        config |= _entries(model, functions, auto)
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # Without its config, what an interruption leaves loads as nothing.
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        for path in directory.iterdir():  # of an earlier save, which `from_pretrained` would read first
            if _WEIGHTS.fullmatch(path.name):
                path.unlink()
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, directory / path.name)


def _entries(model: Any, functions: Mapping[str, Any], auto: list[str]) -> dict[str, Any]:
    """What the configuration says besides that of the pretrained model."""
    return {
        "model_type": _model_type(type(model.config)),
        "architectures": ["LearnedModel"],
        "auto_map": {"AutoConfig": f"{MODULE}.LearnedConfig"} | {name: f"{MODULE}.LearnedModel" for name in auto},
        "learned_activations": functions,
    }


def _settings(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, AffineActivation):
        return {"kind": "affine", "groups": len(module.before), "channel_dim": module.channel_dim}
    assert isinstance(module, RationalActivation)
    return {
        "kind": "rational",
        "groups": module.numerator.shape[0],
        "degrees": [module.numerator.shape[1] - 1, module.denominator.shape[1]],
        "form": module.form,
        "channel_dim": module.channel_dim,
        "anchored": module.anchor is not None,
    }


def _source(network: Any) -> str:
    """The text of `remote_model`, with the classes and the loss of this model.

    Raises:
        AdapterError: They are not classes of transformers.
    """
    model, config = type(network), type(network.config)
    for kind in (model, config):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise AdapterError(
                f"{kind.__name__} is not a class of transformers, which the directory would have to import; save the "
                "model's state_dict"
            )
    text = inspect.getsource(remote_model)
    for marker, line in {
        "BASE CONFIG": f"from transformers import {config.__name__} as PretrainedConfig",
        "BASE MODEL": f"from transformers import {model.__name__} as PretrainedModel",
        "BASE TYPE": f'    model_type = "{_model_type(config)}"',
        "BASE LOSS": f"        self.loss_type = {getattr(network, 'loss_type', None)!r}",
    }.items():
        text, count = re.subn(rf"^.*  # {marker}$", line, text, flags=re.MULTILINE)
        assert count == 1
    return text


def _model_type(config: Any) -> str:
    return f"{config.model_type}_learned_activations"


def _auto_classes(model: type, config: type) -> list[str]:
    """The names of the Auto classes that load this kind of model.

    Raises:
        AdapterError: There is none.
    """
    found = []
    for name in _AUTO_CLASSES:
        mapping: Mapping[Any, Any] | None = getattr(getattr(transformers, name), "_model_mapping", None)
        known = None if mapping is None else mapping.get(config, None)
        if model is known or (isinstance(known, (list, tuple)) and model in known):
            found.append(name)
    if not found:
        raise AdapterError(f"no Auto class of transformers loads {model.__name__}; save the model's state_dict")
    return found
