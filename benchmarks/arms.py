"""The arms of the benchmarks: what is compared, its settings and its name in each table.

To add an arm, add an entry to `ARMS`. It takes part in the benchmarks in whose tables it has a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import lit_adapters as la

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
    """

    rows: dict[Table, Row]
    name: str = ""
    method: type[la.Method] | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)


_LORAN = {"rank": 64, "alpha": 16.0, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}

ARMS = {
    "head": Arm(
        rows={
            "steps vit": Row(0, "head only"),
            "steps smollm2": Row(0, "head only"),
        },
    ),
    "frozen": Arm(
        rows={"steps vit": Row(1, "frozen")},
    ),
    "full": Arm(
        rows={
            "steps vit": Row(2, "full fine-tuning"),
            "steps smollm2": Row(2, "full fine-tuning"),
        },
        name="full fine-tuning",
    ),
    "lora": Arm(
        rows={
            "steps vit": Row(3, "LoRA"),
            "steps smollm2": Row(3, "LoRA"),
        },
        name="LoRA",
        method=la.LoRA,
        vision={"rank": 8},
        language={"rank": 8},
    ),
    "dora": Arm(
        rows={
            "steps vit": Row(5, "DoRA"),
            "steps smollm2": Row(5, "DoRA"),
        },
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
        rows={
            "steps vit": Row(4, "AFA-LoRA"),
            "steps smollm2": Row(4, "AFA-LoRA"),
        },
        name="AFA-LoRA",
        method=la.AFALoRA,
        vision={"rank": 8},
        language={"rank": 8},
    ),
    "nora": Arm(
        rows={
            "steps vit": Row(6, "NoRA"),
            "steps smollm2": Row(6, "NoRA"),
        },
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
        rows={
            "steps vit": Row(8, "NoRA++"),
            "steps smollm2": Row(8, "NoRA++"),
        },
        name="NoRA++",
        method=la.NoRAPlusPlus,
        vision={"lora": la.LoRA(rank=8)},
        language={"nora": la.NoRA(base="anchored"), "lora": la.LoRA(rank=8)},
    ),
}


def names(table: Table) -> dict[str, str]:
    """The arms of a table and their names in it, in the order of its rows."""
    of_table = {key: arm.rows[table] for key, arm in ARMS.items() if table in arm.rows}
    return {key: row.name for key, row in sorted(of_table.items(), key=lambda item: item[1].place)}


def methods() -> dict[str, type[la.Method]]:
    """Every method once, by the arm that has it at its default settings."""
    return {key: arm.method for key, arm in ARMS.items() if arm.method is not None and arm.name}
