"""What the base of an adapter is called on the hub, where the model itself says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

# As a hub has them, and no path of this machine.
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?")
_REVISION = re.compile(r"[\w][\w./-]{0,99}")
# The task of peft, by the end of the name of a class of transformers.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# Others whose name ends in ForConditionalGeneration hear or see.
_SEQUENCE_TO_SEQUENCE = {
    f"{name}ForConditionalGeneration"
    for name in ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers", "Bart", "MBart", "Pegasus", "Blenderbot", "LED")
} | {"MarianMTModel"}


def base_name(model: nn.Module) -> dict[str, str]:
    """`name` and `revision` on the hub, and `task` as peft calls it, as far as the model says.

    The name of a timm model is that of its architecture's usual weights; that it holds them is not certain. The
    fingerprint in an adapter directory tells other weights.

    Args:
        model: A model of transformers or timm; of any other nothing is known.
    """
    found: dict[str, str] = {}
    config: Any = getattr(model, "config", None)
    pretrained: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained, dict):
        name, revision = pretrained.get("hf_hub_id"), None
    else:
        name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
        revision = getattr(config, "_commit_hash", None)
    if isinstance(name, str) and is_repository(name) and not Path(name).exists():
        found["name"] = name
        if isinstance(revision, str) and is_revision(revision):
            found["revision"] = revision
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    if type(model).__name__ in _SEQUENCE_TO_SEQUENCE:
        task = "SEQ_2_SEQ_LM"
    if task is not None and config is not None:
        found["task"] = task
    return found


def is_repository(value: Any) -> bool:
    """Whether a value has the form of a repository's name, such as "user/name"."""
    return isinstance(value, str) and _REPOSITORY.fullmatch(value) is not None


def is_revision(value: Any) -> bool:
    """Whether a value has the form of a branch, tag or commit."""
    return isinstance(value, str) and _REVISION.fullmatch(value) is not None


def is_task(value: Any) -> bool:
    """Whether a value is a task of `base_name`."""
    return value in (*_TASKS.values(), "SEQ_2_SEQ_LM")
