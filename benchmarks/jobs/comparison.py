"""Both sides of a job in turns: whether they did the same, and the ratios of what they took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.jobs.job import Job
from benchmarks.jobs.process import Side
from benchmarks.timing import ratios, spread

EXACT = ("steps", "trained", "images", "questions")
CLOSE = ("tokens", "learned")
TOLERANCE = 0.01
LOSS_TOLERANCE = 1e-3
SIDES = ("ours", "theirs")

Runs = dict[str, list[dict[str, Any]]]  # of each side, what `run` returned in each round


def check(job: Job, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that both sides did the same.

    Args:
        job: The job.
        ours: What `run` returned of our side.
        theirs: The same of the peer's.

    Raises:
        SystemExit: Steps, trained parameters, images or questions differ, or tokens by more than 1%; or, where both
            begin with the same batch, the first loss by more than a thousandth.
    """
    check_counts(job, ours["counts"], theirs["counts"])
    if job.same_first_batch:
        one, other = ours["first_loss"], theirs["first_loss"]
        if abs(one - other) > LOSS_TOLERANCE * abs(other):
            raise SystemExit(f"error: {job.name} begins with the loss {one} in ours and {other} in {job.peer}")


def check_counts(job: Job, ours: dict[str, int], theirs: dict[str, int]) -> None:
    """The part of `check` on what was counted.

    Raises:
        SystemExit: As `check`.
    """
    for counts in (ours, theirs):
        if job.unit not in counts:
            raise SystemExit(f"error: {job.name} counts no {job.unit}")
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        differ = one != other if name in EXACT else name in CLOSE and abs(one - other) > TOLERANCE * other
        if differ:
            raise SystemExit(f"error: {job.name} cannot be compared: ours has {one} {name}, {job.peer} {other}")


def in_turns(job: Job, rounds: int, run: Callable[[Side], dict[str, Any]]) -> Runs:
    """Run both sides in turns, in the opposite order every other round.

    A run of each that does not count comes first: it fills the caches, and shows whether both do the same.

    Args:
        job: The job.
        rounds: Runs of each side that count, at least 2.
        run: Runs a side.

    Raises:
        SystemExit: There are fewer than two rounds, which have no quartiles, or as `check`, of every round.
    """
    if rounds < 2:
        raise SystemExit(f"error: {rounds} rounds have no quartiles; take at least 2")
    first = {name: run(getattr(job, name)) for name in SIDES}
    check(job, first["ours"], first["theirs"])
    runs: Runs = {name: [] for name in SIDES}
    for number in range(rounds):
        for name in SIDES[:: 1 if number % 2 == 0 else -1]:
            runs[name].append(run(getattr(job, name)))
        check(job, runs["ours"][-1], runs["theirs"][-1])
        ours, theirs = (runs[name][-1]["seconds"] for name in SIDES)
        print(f"{job.name}, round {number + 1}: {ours:.1f} s, {job.peer} {theirs:.1f} s", flush=True)
    return runs


def summary(job: Job, runs: Runs) -> dict[str, Any]:
    """Medians and quartiles of each side, and of the ratios of ours over the peer's in the same round."""
    measured = [name for name in ("seconds", "steady_seconds", "peak_mib") if name in runs["ours"][0]]
    measured = [name for name in measured if name in runs["theirs"][0]]
    values = {name: {side: [run[name] for run in runs[side]] for side in SIDES} for name in measured}
    found = {
        "job": job.name,
        "peer": job.peer,
        "unit": job.unit,
        "settings": job.settings,
        **{side: _side(job, runs[side]) for side in SIDES},
        "over_peer": {name: ratios(of, "ours", "theirs") for name, of in values.items()},
    }
    answers = runs["ours"][-1]["answers"], runs["theirs"][-1]["answers"]
    if answers[0]:
        equal = sum(one == other for one, other in zip(*answers, strict=True))
        found["equal_answers"] = equal / len(answers[0])
    return found


def _side(job: Job, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: spread([run[name] for run in runs])
        for name in ("seconds", "steady_seconds", "peak_mib")
        if name in runs[0]
    }
    found["counts"] = runs[-1]["counts"]
    found["per_second"] = runs[-1]["counts"][job.unit] / found["seconds"]["median"]
    found["stages"] = {name: spread([run["stages"][name] for run in runs]) for name in runs[0]["stages"]}
    return found
