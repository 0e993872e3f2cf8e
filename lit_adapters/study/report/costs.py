"""The last section of a report: costs, versions, and the command."""

from __future__ import annotations

import math
import shlex
from typing import Any

from lit_adapters.study.records import Record
from lit_adapters.study.report.blocks import Block, Code, Heading, Inline, InlineCode, Paragraph, Strong, Table
from lit_adapters.study.report.digits import duration
from lit_adapters.study.report.summary import Summary


def cost_blocks(summary: Summary) -> list[Block]:
    """Runs and time of each stage and arm, versions, and how to run the study again."""
    study = summary.study
    blocks: list[Block] = [Heading("Costs, versions, and how to run it again")]
    stages = {"search": "search", "final": "final", "noise": "noise floor"}
    rows: list[list[Inline]] = []
    for stage, words in stages.items():
        of_stage = [record for record in summary.records if record.stage == stage]
        if of_stage:
            rows.append([words, *_cost(of_stage)])
    if len(rows) > 1:
        rows.append([Strong("all"), *_cost(summary.records)])
    if rows:
        blocks.append(Table(["runs", ">number", ">diverged", ">time"], rows))
    costs: list[list[Inline]] = [
        [
            arm.title,
            "-" if arm.chosen is None else str(arm.chosen.runs),
            str(len(arm.finals)),
            duration(arm.seconds) if math.isfinite(arm.seconds) else "-",
            f"{arm.memory:,.0f} MiB" if math.isfinite(arm.memory) else "-",
        ]
        for arm in summary.by_parameters()
        if any(record.arm == arm.key for record in summary.records)
    ]
    if rows:
        blocks.append(Table(["arm", ">search runs", ">final runs", ">time of a final run", ">peak memory"], costs))
    environment = _environment(summary.records)
    if environment:
        blocks.append(Paragraph("; ".join(environment) + ".", small=True))
    places = "".join(f" --path {shlex.quote(key)}=DIR" for key in study.paths)
    blocks.append(Code(f"lit-adapters study run {shlex.quote(study.path.name)}{places}"))
    file: Inline = [
        "Study file ",
        InlineCode(study.path.name),
        ", SHA-256 begins with ",
        InlineCode(study.digest()),
        ".",
    ]
    blocks.append(Paragraph(file, small=True))
    return blocks


def _cost(records: list[Record]) -> list[Inline]:
    seconds = sum(record.seconds.get("total", 0.0) for record in records)
    diverged = sum(record.status == "diverged" for record in records)
    return [str(len(records)), str(diverged), duration(seconds)]


def _environment(records: list[Record]) -> list[str]:
    """What runs ran on: one value, or the first and the last of several."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.environment.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    texts = []
    for name, known in values.items():
        ordered = sorted({True: "yes", False: "no"}[v] if isinstance(v, bool) else str(v) for v in known)
        shown = ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
        texts.append(f"{name.replace('_', ' ')} {shown}")
    return texts
