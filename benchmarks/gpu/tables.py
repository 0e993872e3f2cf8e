"""What docs/performance.md shows of the questions that were asked on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.arms import STEPS, names
from benchmarks.gpu.questions import QUESTIONS
from benchmarks.gpu.setting import Record
from benchmarks.results_file import with_spread

NOT_RUN = "**Nothing has been run on a GPU.** This place shows the tables once `make bench-gpu` has run on one."

Table = tuple[list[str], list[list[str]]]  # header and rows


def sections(records: Sequence[Record]) -> list[tuple[str, Table | None]]:
    """The latest answer to each question that was asked on a GPU: what became of it, and the table of its results."""
    found = []
    for question in QUESTIONS:
        asked = [r for r in records if r["question"] == question.name and r["device"] == "cuda"]
        if asked:
            latest = next((r for r in reversed(asked) if r["results"]), asked[-1])
            found.append((_heading(latest), _TABLES[question.name](latest["results"]) if latest["results"] else None))
    return found


def _heading(record: Record) -> str:
    name, status = record["question"][0].upper() + record["question"][1:], record["status"]
    if status == "not run":
        return f"**{name}**: not run, as the time was up."
    error = record.get("error", "").strip().rpartition("\n")[2]
    if not record["results"]:
        return f"**{name}**: {status}{f' ({error})' if error else ''}."
    e = record["environment"] or {}
    where = ", ".join(f"{k} {e[k]}" for k in ("driver", "torch", "triton", "transformers", "peft", "trl") if e.get(k))
    became = {"answered": "", "stopped": " Stopped when its time was up.", "failed": f" It failed at last: {error}."}
    failed = [f"{_what(r)}: {r['error']}" for r in record["results"] if "error" in r]
    errors = f" Failed: {'; '.join(failed)}." if failed else ""
    return f"**{name}**, on {e.get('device', 'a GPU')} ({where}), {e.get('date', '')}.{became[status]}{errors}"


def _what(result: Record) -> str:
    named = {k: v for k, v in result.items() if k not in ("error", "what", "model") and v is not False}
    return " ".join(k if v is True else str(v) for k, v in named.items())


def _errors(results: Sequence[Record]) -> Table:
    """One row for each form, dtype and kind: the largest errors as shares of their limits."""
    rows = []
    kept = [r for r in results if "right" in r]
    for key in dict.fromkeys((r["form"], r["dtype"], r["anchored"], r["case"] == "huge") for r in kept):
        form, dtype, anchored, huge = key
        of = [r for r in kept if (r["form"], r["dtype"], r["anchored"], r["case"] == "huge") == key]
        shares = [
            max((r[name] / r[f"{name}_limit"] for r in of if name in r), default=None)
            for name in ("y", "dx", "coefficients")
        ]
        cells = ["" if s is None else f"**{s:.2f}**" if s > 1 else f"{s:.2f}" for s in shares]
        exact = all(r.get("zero_at_start", True) and r.get("repeats", True) for r in of)
        kind = "huge inputs" if huge else "anchored" if anchored else "plain"
        rows.append([f"{form}, {dtype}, {kind}", *cells, "yes" if exact else "**no**"])
    header = ["error / its limit", "y", "gradient of x", "of the coefficients", "repeats; 0 at the start"]
    return header, rows


def _speed(results: Sequence[Record]) -> Table:
    """One row for each pass and variant; by dtype the time over GELU's and over that of moving the bytes."""
    kept = [r for r in results if "seconds" in r]
    dtypes = list(dict.fromkeys(r["dtype"] for r in kept))
    rows = []
    for step, variant in dict.fromkeys((r["pass"], r["variant"]) for r in kept):
        of = {r["dtype"]: r for r in kept if (r["pass"], r["variant"]) == (step, variant)}
        row = [f"{variant}, {step}"]
        for dtype in dtypes:
            row += [with_spread(of[dtype][k]) for k in ("over_gelu", "over_bound")] if dtype in of else ["", ""]
        rows.append(row)
    return ["variant", *(f"{d} / {other}" for d in dtypes for other in ("faster GELU", "moving the bytes"))], rows


def _steps(model: str) -> Callable[[Sequence[Record]], Table]:
    """One row for each arm that ran: time, ratios and memory."""

    def table(results: Sequence[Record]) -> Table:
        of: dict[tuple[str, str], Record] = {}
        for r in results:
            of.setdefault((r["arm"], r["library"]), {}).update(r)
        arms = {"frozen": "frozen"} | names(STEPS["vit" if model == "vit" else "smollm2"])
        rows = []
        for (arm, library), r in of.items():
            times = [f"{1e3 * r['seconds']['median']:.1f}" if "seconds" in r else "not run"]
            times += [with_spread(r[k]) if k in r else "" for k in ("over_frozen", "over_full", "over_peft")]
            memory = [f"{r[k]:,}" if k in r else "" for k in ("allocated_mib", "reserved_mib", "trainable")]
            rows.append([arms[arm] + (", peft" if library == "peft" else ""), *times, *memory])
        return ["arm", "step, ms", "/ frozen", "/ full", "/ peft", "allocated, MiB", "reserved, MiB", "trained"], rows

    return table


def _fine_tuning(results: Sequence[Record]) -> Table:
    """One row for each training, and the ratio of the steps."""
    rows = []
    ratio = next((with_spread(r["over_trl"]) for r in results if "over_trl" in r), "")
    for r in (r for r in results if "step" in r):
        of = "lit_adapters and Lightning" if r["library"] == "ours" else "TRL and peft"
        cells = [f"{1e3 * r['step']['median']:.1f}", ratio if r["library"] == "ours" else ""]
        cells += [f"{r['tokens_a_second']:,.0f}", f"{r['whole_seconds']:.1f}"]
        rows.append([of, *cells, f"{r['allocated_mib']:,}", f"{r['reserved_mib']:,}"])
    return ["training", "step, ms", "/ TRL", "tokens a second", "whole, s", "allocated, MiB", "reserved, MiB"], rows


def _generation(results: Sequence[Record]) -> Table:
    """One row for each model."""
    arms = names(STEPS["smollm2"]) | {"base": "base", "base again": "the base once more: chance"}
    rows = []
    for r in (r for r in results if "seconds" in r):
        name = arms[r["arm"]] + (", peft" if r["library"] == "peft" else "") + (", merged" if r["merged"] else "")
        rows.append([name, with_spread(r["over_base"]), f"{r['tokens_a_second']:.1f}"])
    return ["model", "time / base", "tokens a second"], rows


_TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    "rational errors": _errors,
    "rational speed": _speed,
    "steps of the LLaMA": _steps("llama"),
    "steps of the ViT": _steps("vit"),
    "whole fine-tuning": _fine_tuning,
    "generation": _generation,
}
