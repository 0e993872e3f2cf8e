"""What a study names beforehand, kept with each final run, so that a later change of it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_adapters.study.records import Record
from lit_adapters.study.settings import Study

# What is compared with earlier versions, and how a sentence on it begins. Protocols of earlier versions may lack some.
_WORDS = {
    "contrasts": "contrasts were",
    "margin": "margin was",
    "metric": "metric was",
    "sets": "training sets were",
    "seeds": "seeds were",
    "search": "search was",
}


def protocol_of(study: Study) -> dict[str, Any]:
    """What must not change once final results are known, as plain values."""
    metric, search = study.metric, study.search
    return {
        "arms": [key for key, arm in study.arms.items() if not arm.exploratory],
        "contrasts": [list(pair) for pair in study.contrasts],
        "margin": study.margin,
        "metric": [metric.name, metric.better, metric.scale],
        "sets": list(study.repeat.sets),
        "seeds": list(study.repeat.seeds),
        "search": search and [search.metric.name, search.metric.better, list(search.sets), list(search.grid)],
    }


def changes(study: Study, records: Sequence[Record]) -> list[str]:
    """Sentences on what has changed in the study's file since its final runs were started."""
    kept = _kept(records)
    now = protocol_of(study)
    sentences = []
    for name, word in _WORDS.items():
        earlier: list[Any] = []
        for protocol in kept:
            if name in protocol and protocol[name] != now[name] and protocol[name] not in earlier:
                earlier.append(protocol[name])
        if earlier:
            shown = " and then ".join(_shown(name, value) for value in earlier)
            sentences.append(f"the {word} {shown} before")
    late = [key for key in now["arms"] if any(key not in protocol.get("arms", now["arms"]) for protocol in kept)]
    if late:
        sentences.append(f"arms were added ({', '.join(late)}), which should say `exploratory: true`")
    gone = [key for key in _named_first(records)[0] if key not in now["arms"]]
    if gone:
        sentences.append(f"arms were taken out of the comparison ({', '.join(gone)})")
    return sentences


def family_of(study: Study, records: Sequence[Record]) -> int:
    """How many contrasts the correction for several must count: those of the study, and those it began with.

    Contrasts of exploratory arms are not tested. One whose arm was declared exploratory afterwards still counts.
    """
    confirmed = [pair for pair in study.contrasts if not any(study.arms[key].exploratory for key in pair)]
    return len({frozenset(pair) for pair in confirmed} | _named_first(records)[1])


def _kept(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [record.protocol for record in records if record.stage == "final" and record.protocol]


def _named_first(records: Sequence[Record]) -> tuple[list[str], set[frozenset[str]]]:
    """The arms that were to be compared, and their contrasts, when the first final runs ended.

    An arm that some of the runs of that moment do not have was added between them.
    """
    finals = [record for record in records if record.stage == "final" and record.protocol]
    moments = [r.ended or str(r.environment.get("date", "")) for r in finals]
    first = [r.protocol for r, moment in zip(finals, moments, strict=True) if moment == min(moments)]
    if not first:
        return [], set()
    arms = [key for key in first[0].get("arms", ()) if all(key in protocol.get("arms", ()) for protocol in first)]
    pairs = {frozenset(pair) for protocol in first for pair in protocol.get("contrasts", ())}
    return arms, {pair for pair in pairs if pair <= set(arms)}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "contrasts":
        return ", ".join(" - ".join(pair) for pair in value) or "none"
    if name == "metric":
        return f"{value[0]} ({value[1]} is better, scale {value[2]:g})"
    if name == "search":
        return f"by {value[0]} ({value[1]} is better) on the sets {_listed(value[2])}, rates from {_listed(value[3])}"
    return _listed(value) if isinstance(value, list) else f"{value:g}"


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
