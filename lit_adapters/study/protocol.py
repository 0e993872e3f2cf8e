"""What a study names beforehand, kept with each final run, so that a later change of it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_adapters.study.records import Record
from lit_adapters.study.settings import Study


def protocol_of(study: Study) -> dict[str, Any]:
    """What must not change once final results are known, as plain values."""
    metric = study.metric
    return {
        "arms": [key for key, arm in study.arms.items() if not arm.exploratory],
        "contrasts": [list(pair) for pair in study.contrasts],
        "margin": study.margin,
        "metric": [metric.name, metric.better, metric.scale],
    }


def changes(study: Study, records: Sequence[Record]) -> list[str]:
    """Sentences on what has changed in the study's file since its final runs were started."""
    kept = [record.protocol for record in records if record.stage == "final" and record.protocol]
    now = protocol_of(study)
    sentences = []
    for name, word in (("contrasts", "contrasts were"), ("margin", "margin was"), ("metric", "metric was")):
        earlier: list[Any] = []
        for protocol in kept:
            if protocol.get(name) != now[name] and protocol.get(name) not in earlier:
                earlier.append(protocol.get(name))
        if earlier:
            shown = " and then ".join(_shown(name, value) for value in earlier)
            sentences.append(f"the {word} {shown} before")
    late = [key for key in now["arms"] if any(key not in protocol.get("arms", now["arms"]) for protocol in kept)]
    if late:
        sentences.append(f"arms were added ({', '.join(late)}), which should say `exploratory: true`")
    return sentences


def _shown(name: str, value: Any) -> str:
    if name == "contrasts":
        return ", ".join(" - ".join(pair) for pair in value) or "none"
    if name == "metric":
        return f"{value[0]} ({value[1]} is better, scale {value[2]:g})"
    return "none" if value is None else f"{value:g}"
