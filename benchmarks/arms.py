"""The arms of the benchmarks: what is compared, its settings and its name in each table.

To add an arm, add an entry to `ARMS`. It takes part in the benchmarks in whose tables it has a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch.optim import AdamW, Optimizer

import lit_adapters as la
from lit_adapters import optimizers

Table = Literal["steps vit", "steps smollm2"]  # of the models of step_time

# The table of each model of step_time.
STEPS: dict[str, Table] = {"vit": "steps vit", "smollm2": "steps smollm2"}


class Row(NamedTuple):
    """The row of an arm in a table.

    Attributes:
        place: Rows are sorted by it.
        name: What the table calls the arm.
    """

    place: int
    name: str


@dataclass(frozen=True)
class Arm:
    """An adapter method, or a control without one.

    Attributes:
        rows: The row in each table.
        name: In tables that compare methods alone, at their default settings.
        method: The class of the method; None for a control.
        vision: Settings of the method for a ViT, in `step_time`.
        language: Settings of the method for a language model, in `step_time`.
        optimizer: The class of the optimiser, in `step_time`.
    """

    rows: dict[Table, Row]
    name: str = ""
    method: type[la.Method] | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    optimizer: type[Optimizer] = AdamW


def _both(place: int, name: str) -> dict[Table, Row]:
    """The same row in the table of each model."""
    return {table: Row(place, name) for table in STEPS.values()}


_LORAN = {"rank": 64, "alpha": 16.0, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}
_DENSE = {"rank": 16, "alpha": 32.0, "dropout": 0.05}
_NESTED = {"rank": 64, "inner_rank": 16, "alpha": 64.0, "init": "svd"}
_LORA2 = {"width": 8, "rank": 8, "target_rank": 4, "prune_until": 0.7}
_VIT_LAYERS = ["attn.qkv", "attn.proj", "fc1", "fc2"]
_LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ADALORA = {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "lora_alpha": 16, "orth_reg_weight": 0.5}
_PEFT_VERA = {"peft_type": "VERA", "r": 256}

ARMS = {
    "head": Arm(
        rows=_both(0, "head only"),
    ),
    "frozen": Arm(
        rows={"steps vit": Row(1, "frozen")},
    ),
    "full": Arm(
        rows=_both(2, "full fine-tuning"),
        name="full fine-tuning",
    ),
    "lora": Arm(
        rows=_both(3, "LoRA"),
        name="LoRA",
        method=la.LoRA,
        vision={"rank": 8},
        language={"rank": 8},
    ),
    "dora": Arm(
        rows=_both(5, "DoRA"),
        name="DoRA",
        method=la.DoRA,
        vision={"rank": 8},
        language={"rank": 8},
    ),
    "loran": Arm(
        rows={
            "steps vit": Row(9, "LoRAN"),
            "steps smollm2": Row(9, "LoRAN, r = 64, q and v"),
        },
        name="LoRAN",
        method=la.LoRAN,
        vision={"rank": 8},
        language=_LORAN,
    ),
    "lora_like_loran": Arm(
        rows={"steps smollm2": Row(10, "LoRA, r = 64, q and v")},
        method=la.LoRA,
        language=_LORAN,
    ),
    "afa": Arm(
        rows=_both(4, "AFA-LoRA"),
        name="AFA-LoRA",
        method=la.AFALoRA,
        vision={"rank": 8},
        language={"rank": 8},
    ),
    "nora": Arm(
        rows=_both(6, "NoRA"),
        name="NoRA",
        method=la.NoRA,
        language={"base": "anchored"},
    ),
    "nora_anchored": Arm(
        rows={
            "steps vit": Row(7, "NoRA, anchored"),
        },
        method=la.NoRA,
        vision={"base": "anchored"},
    ),
    "nora_plus_plus": Arm(
        rows=_both(8, "NoRA++"),
        name="NoRA++",
        method=la.NoRAPlusPlus,
        vision={"lora": la.LoRA(rank=8)},
        language={"nora": la.NoRA(base="anchored"), "lora": la.LoRA(rank=8)},
    ),
    "pissa": Arm(
        rows=_both(11, "LoRA, PiSSA start"),
        method=la.LoRA,
        vision={"rank": 8, "start": "pissa"},
        language={"rank": 8, "start": "pissa"},
    ),
    "adalora": Arm(
        rows=_both(12, "AdaLoRA by peft, r = 12 to 8"),
        method=la.Peft,
        vision={"config": {**_ADALORA, "target_modules": _VIT_LAYERS}},
        language={"config": {**_ADALORA, "target_modules": _LLAMA_LAYERS}},
    ),
    "dense_lora": Arm(
        rows=_both(13, "DenseLoRA, r = 16"),
        method=la.DenseLoRA,
        vision=_DENSE,
        language=_DENSE,
    ),
    "nested_lora": Arm(
        rows=_both(14, "NestedLoRA, r = 64, inner 16"),
        method=la.NestedLoRA,
        vision=_NESTED,
        language=_NESTED,
    ),
    "lora2": Arm(
        rows=_both(15, "LoRA², k = 8, r = 8"),
        method=la.LoRA2,
        vision=_LORA2,
        language=_LORA2,
    ),
    "vera": Arm(
        rows=_both(16, "VeRA, r = 256"),
        method=la.VeRA,
        vision={"rank": 256},
        language={"rank": 256},
    ),
    "vera_peft": Arm(
        rows=_both(17, "VeRA by peft, r = 256"),
        method=la.Peft,
        vision={"config": {**_PEFT_VERA, "target_modules": _VIT_LAYERS}},
        language={"config": {**_PEFT_VERA, "target_modules": _LLAMA_LAYERS}},
    ),
    "bitfit": Arm(
        rows=_both(18, "BitFit"),
        method=la.BitFit,
        vision={},
        language={"add_missing": True},
    ),
    "group_affine": Arm(
        rows=_both(19, "GroupAffine"),
        method=la.GroupAffine,
        vision={},
        language={},
    ),
    "lora_plus": Arm(
        rows=_both(20, "LoRA with LoRA+"),
        method=la.LoRA,
        vision={"rank": 8},
        language={"rank": 8},
        optimizer=optimizers.LoRAPlus,
    ),
    "lora_rite": Arm(
        rows=_both(21, "LoRA with LoRA-RITE"),
        method=la.LoRA,
        vision={"rank": 8},
        language={"rank": 8},
        optimizer=optimizers.LoRARITE,
    ),
    "loft": Arm(
        rows=_both(22, "LoRA with LoFT"),
        method=la.LoRA,
        vision={"rank": 8},
        language={"rank": 8},
        optimizer=optimizers.LoFT,
    ),
    "lora_pre": Arm(
        rows=_both(23, "full fine-tuning with LoRA-Pre"),
        optimizer=optimizers.LoRAPre,
    ),
}


def names(table: Table) -> dict[str, str]:
    """The arms of a table and their names in it, in the order of its rows."""
    of_table = {key: arm.rows[table] for key, arm in ARMS.items() if table in arm.rows}
    return {key: row.name for key, row in sorted(of_table.items(), key=lambda item: item[1].place)}


def methods() -> dict[str, type[la.Method]]:
    """Every method once, by the arm that has it at its default settings."""
    return {key: arm.method for key, arm in ARMS.items() if arm.method is not None and arm.name}
