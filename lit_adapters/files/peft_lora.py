"""The files that the peft library writes for LoRA and DoRA: `adapter_config.json` and `adapter_model.safetensors`.

base_model.model.<layer>.lora_A.weight            (r, in); of a convolution (r, in, *kernel)
base_model.model.<layer>.lora_B.weight            (out, r); of a convolution (out, r, 1, ...)
base_model.model.<layer>.lora_magnitude_vector    (out,); of a convolution (1, out, 1, ...); DoRA only
base_model.model.<parameter>                      of the modules in `modules_to_save`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.patterns import check_few_ways
from lit_adapters.methods.peft import SAFE_INITS, require_peft

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LAYER_KEY = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)")
# Settings of a LoraConfig that `import_peft` follows, or that say nothing about the adapter's function.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}


def read_lora(directory: Path) -> tuple[Any, dict[str, Tensor]]:
    """The LoraConfig of a directory, and its tensors by their names without the prefix.

    Raises:
        AdapterError: Peft or a file is missing, a file is torn, or a setting or a tensor has no counterpart here.
    """
    peft = require_peft()
    for path in (directory / CONFIG, directory / TENSORS):
        if not path.is_file():
            pickled = " (adapter_model.bin is a pickle: load it with peft and save it again)" * (
                path.name == TENSORS and (directory / "adapter_model.bin").is_file()
            )
            raise AdapterError(f"{path} does not exist; give a directory that peft saved{pickled}")
    try:
        raw = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = raw["peft_type"]
        tensors = load_file(directory / TENSORS)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise AdapterError(f"{directory} is torn, or was not saved by peft: {shown(error, 300)}") from error
    if kind != "LORA":
        raise AdapterError(f"{directory} holds {_name(kind)}; only LORA can be imported: train others as la.Peft")
    default = peft.LoraConfig()
    known = {k: v for k, v in raw.items() if k in vars(default)}
    for setting in (k for k in raw if k not in known and raw[k]):
        raise AdapterError(
            f"{directory}: peft {peft.__version__} does not know {_name(setting)}={shown(raw[setting])}; update it"
        )
    _check_values(known, directory)
    try:
        config = peft.LoraConfig(**known)
    except Exception as error:  # configurations of peft raise many kinds
        raise AdapterError(f"peft refuses {directory / CONFIG}: {str(error)[:300]}") from error
    if config.init_lora_weights not in SAFE_INITS:
        raise AdapterError(
            f"{directory}: init_lora_weights={shown(config.init_lora_weights)} changed the base model's weights; "
            "convert with save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft"
        )
    for setting, value in vars(config).items():
        if setting not in _UNDERSTOOD and value != getattr(default, setting):
            raise AdapterError(f"{directory}: {setting}={shown(value)} has no counterpart in la.LoRA or la.DoRA")
    for key in tensors:
        rest = key.removeprefix(PREFIX)
        if rest == key or (".lora_" in rest and (not LAYER_KEY.fullmatch(rest) or not tensors[key].dim())):
            raise AdapterError(f"{directory}: {shown(key)} is not a tensor of a LoRA on linear layers or convolutions")
    return config, {key.removeprefix(PREFIX): t for key, t in tensors.items()}


def _name(value: Any) -> str:
    """A setting or type of peft for a message, cut if it is long."""
    return shown(value).strip("'")


def _check_values(config: Mapping[str, Any], directory: Path) -> None:
    """Check the settings that `import_peft` follows, which peft takes as they are.

    Raises:
        AdapterError: One has another type than peft writes, is not finite, or is a pattern that may take for ever.
    """
    for setting, (fits, what) in _VALUES.items():
        if setting in config and not fits(config[setting]):
            raise AdapterError(f"{directory / CONFIG}: {setting} is {shown(config[setting])}, and must be {what}")
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(setting) or {}:
            check_few_ways(setting, pattern)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_pattern_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: _is_pattern_of(value, _is_whole), "null or whole numbers by pattern"),
    "alpha_pattern": (lambda value: _is_pattern_of(value, _is_number), "null or numbers by pattern"),
    "modules_to_save": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(n, str) and n for n in value)),
        "null or a list of names",
    ),
}
