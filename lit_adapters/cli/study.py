"""`lit-adapters study`: carry out a comparison of methods, show its progress, and write its report."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from lit_adapters import console
from lit_adapters.errors import AdapterError
from lit_adapters.study.planning import AllDivergedError, Plan
from lit_adapters.study.reading import read_study
from lit_adapters.study.records import Results
from lit_adapters.study.report.digits import duration
from lit_adapters.study.running import check_owner, run_study, seconds_left
from lit_adapters.study.settings import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands run, status and report."""
    parser.add_argument("action", choices=["run", "status", "report"], help="what to do; run goes on where it stopped")
    parser.add_argument("file", type=Path, metavar="STUDY.yaml", help="the study; docs/studies.md explains it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; default: beside the file")
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="KEY=DIR",
        help="where data are on this machine: replaces a value of the study's section paths",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="run: runs at a time; default: the study's own number")
    parser.add_argument("--executor", choices=["local", "ray", "slurm"], help="run: where; default: the study's own")
    parser.add_argument("--hours", type=float, metavar="H", help="run: start no run after this time")


def study_command(args: argparse.Namespace) -> None:
    """`study`: carry out a comparison of methods, and report it."""
    study = _moved(read_study(args.file), args.path)
    folder = args.out or study.folder
    check_owner(folder, study.name)
    if args.action == "status":
        print(status(study, Results.load(folder)))
        return
    if args.action == "run":
        if args.workers is not None and args.workers < 1:
            raise AdapterError(f"--workers {args.workers} must be at least 1")
        if args.executor is not None:
            study = replace(study, run=replace(study.run, executor=args.executor))
        try:
            results = run_study(study, folder, args.workers, args.hours)
        except KeyboardInterrupt:
            print("stopped: finished runs are kept, and the same command goes on", file=sys.stderr)
            sys.exit(130)
        print(status(study, results))
        print(f"lit-adapters study report {args.file} shows what was found")
        return
    from lit_adapters.study.report.page import write_report  # matplotlib takes a while

    print(write_report(study, Results.load(folder), folder))


def _moved(study: Study, paths: list[str]) -> Study:
    """The study with other places of its data.

    Raises:
        AdapterError: A path is not KEY=DIR, or its key is not in the study's section paths.
    """
    moved = dict(study.paths)
    for text in paths:
        key, equals, place = text.partition("=")
        if not equals or key not in moved:
            known = ", ".join(moved) or "none"
            raise AdapterError(f"--path {text!r} must be KEY=DIR with a key of the study's section paths: {known}")
        moved[key] = place
    return replace(study, paths=moved)


def status(study: Study, results: Results) -> str:
    """The progress of a study: a table with a row for each arm, and the time left."""
    plan = Plan(study)
    used = plan.used(results)
    needed = len(study.repeat.sets) * len(study.repeat.seeds)
    rows = [("arm", "search", "rates", "final runs", "diverged")]
    for key in study.arms:
        try:
            chosen = plan.chosen(results, key)
        except AllDivergedError:
            runs = sum(record.arm == key and record.stage == "search" for record in results.records)
            rows.append((key, f"{runs} of {runs}", "every rate diverged", f"0 of {needed}", ""))
            continue
        finals = {} if chosen.rates is None else plan.finished(results, key, chosen.rates)
        search = f"{chosen.runs} of {chosen.runs + len(chosen.due)}" if chosen.tried else "none"
        rates = "searching" if chosen.rates is None else ", ".join(f"{g} {r:g}" for g, r in chosen.rates.items())
        rates += " (at the edge of the grid)" if chosen.edge else ""
        diverged = sum(record.status == "diverged" for record in finals.values())
        rows.append((key, search, rates, f"{len(finals)} of {needed}", str(diverged or "")))
    left = plan.expected(results)
    seconds = seconds_left(plan, results) / study.run.workers
    spent = sum(record.seconds.get("total", 0.0) for record in results.records if record.id in used)
    others = len(results.records) - len(used)
    unused = f"; {others} more are of an earlier version of the file, and are not used" if others else ""
    more = f"; about {duration(seconds)} left with {study.run.workers} at a time" if left and used else ""
    return (
        f"{console.text_table(rows)}\n{len(used)} runs finished in {duration(spent)}, {left} left"
        f" (and extensions of grids){more}{unused}"
    )
