"""Write the tables and figures of README.md, docs/ and benchmarks/results/tables.md from the result files.

python -m benchmarks.tables
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    bounds,
    language_tables,
    performance_tables,
    regime_tables,
    study_tables,
    subspace_tables,
)
from benchmarks.gpu import tables as gpu_tables
from benchmarks.results_file import RESULTS, load
from lit_adapters.files.atomic import write_text_atomically

ROOT = Path(__file__).parents[1]
ALL_TABLES = "benchmarks/results/tables.md"  # every row of what the pages show in part


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine(records: list[dict[str, Any]]) -> str:
    """Where, with what and when the latest record was measured."""
    e = records[-1]["environment"]
    return f"{_equipment(e)}, {e['date']}."


def machines(tables: list[list[dict[str, Any]]]) -> str:
    """Where and with what the latest records of several tables were measured: a sentence for each equipment."""
    dates: dict[str, list[str]] = {}
    for records in tables:
        e = records[-1]["environment"]
        dates.setdefault(_equipment(e), []).append(e["date"])
    return " ".join(
        f"{equipment}, {' to '.join(dict.fromkeys((min(days), max(days))))}." for equipment, days in dates.items()
    )


def _equipment(e: dict[str, Any]) -> str:
    computes = {True: ", with bfloat16", False: ", without bfloat16"}.get(e.get("bfloat16"), "")  # type: ignore[arg-type]
    versions = ", ".join(f"{k} {e[k]}" for k in ("torch", "lightning", "timm", "transformers") if k in e)
    return f"{e['cores']} cores of {e['cpu']}{computes}, {e['threads']} thread(s) a process, {versions}"


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between <!-- name --> and <!-- /name --> in a page.

    Raises:
        SystemExit: The page has no such block.
    """
    source = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(source):
        raise SystemExit(f"error: {path} has no block <!-- {name} -->")
    write_text_atomically(path, pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", source))


def main() -> None:
    """Fill every block."""
    language()
    regimes()
    subspaces()
    linearisations()
    performance()
    gpu()
    study_tables.fill(ROOT)


def performance() -> None:
    """Fill the blocks on speed and memory."""
    page = ROOT / "docs" / "performance.md"
    every = ROOT / ALL_TABLES
    header = ["quantity", "at most", "measured (quartiles)"]
    replace_block(page, "bounds", table(header, [bound.row() for bound in bounds.bounds()]))
    t = performance_tables
    over = "time / GELU's"
    sections: dict[str, tuple[Path, str, list[str], Callable[[list[dict[str, Any]]], list[list[str]]]]] = {
        "rational": (
            every,
            "rational_speed",
            ["variant", f"float32, {over}", f"bfloat16, {over}", "bound"],
            t.rational_rows,
        ),
        "peft": (
            every,
            "against_peft",
            [
                "model",
                "method",
                "precision",
                "seconds, ours / peft",
                "time / peft's",
                "each / frozen",
                "bound",
                "resident, MiB",
                "saved (largest), MiB",
                "allocated, MiB",
            ],
            lambda records: t.peft_rows(records, load(RESULTS / "peft_memory.json")),
        ),
        "shares": (every, "time_shares", ["step", *(f"{kind}, ms" for kind in t.KINDS), "time / peft's"], t.share_rows),
        "loran": (
            every,
            "loran_speed",
            ["method", "tokens", "seconds", "time / LoRA's", "time / the branch's", "allocated, MiB", "resident, MiB"],
            t.loran_rows,
        ),
        "startup": (
            every,
            "startup",
            ["method", "attach to a LLaMA of 8B on meta, s", "load into ViT-S, s", "file, bytes: values + rest"],
            t.startup_rows,
        ),
        "inference": (
            page,
            "inference",
            ["variant", "ViT-S / base", "generation / base", "tokens a second"],
            t.inference_rows,
        ),
    }
    shown_on_page = []
    for name, (where, file, header, rows) in sections.items():
        if records := load(RESULTS / f"{file}.json"):
            shown = table(header, rows(records))
            if where == every:
                shown += f"\n\n{machine(records)}"
            replace_block(where, name, shown)
            if name != "shares":
                shown_on_page.append(records)
    compared = load(RESULTS / "against_peft.json")
    header = ["step at r = 8", "processor with bfloat16, each run", "without, each run"]
    replace_block(every, "repeated", table(header, t.repeated_rows(compared)))
    header = ["ours / peft's", *(f"{precision}: {name}" for precision in ("fp32", "bf16") for name in t.PEFT_PAGE)]
    replace_block(page, "peft", table(header, t.peft_page_rows(compared, load(RESULTS / "peft_memory.json"))))
    if records := load(RESULTS / "rational_speed.json"):
        replace_block(page, "rational", t.unbounded_rationals(records))
    if records := load(RESULTS / "whole_jobs.json"):
        header = [
            "job",
            "seconds, ours / peer's",
            "time",
            "a steady step",
            "a second of the whole job, ours / peer's",
            "peak memory",
        ]
        replace_block(page, "whole-jobs", table(header, t.whole_job_rows(records)))
        shown = table(["job", "seconds by stage"], t.whole_job_stages(records))
        replace_block(every, "whole-jobs", f"{shown}\n\n{machine(records)}")
        shown_on_page.append(records)
    steps = load(RESULTS / "step_time.json")
    for model in dict.fromkeys(r["model"] for r in steps):
        of = {p: [r for r in steps if (r["model"], r["precision"]) == (model, p)] for p in ("fp32", "bf16")}
        measured = {precision: records for precision, records in of.items() if records}
        where_measured = "\n\n".join(f"{precision}: {machine(records)}" for precision, records in measured.items())
        replace_block(every, f"steps-{model}", f"{table(*t.step_table(steps, model))}\n\n{where_measured}")
        replace_block(page, f"steps-{model}", table(*t.step_page_table(steps, model)))
        shown_on_page += measured.values()
    if records := load(RESULTS / "startup.json"):
        replace_block(page, "startup", t.beginning(records))
    if records := load(RESULTS / "growth.json"):
        header = ["method", *dict.fromkeys(r["quantity"] for r in records)]
        replace_block(page, "growth", f"{table(header, t.growth_rows(records))}\n\n![seconds a step](growth.png)")
        t.growth_figure(records, ROOT / "docs" / "growth.png")
        shown_on_page.append(records)
    replace_block(page, "machine", machines(shown_on_page))


def gpu() -> None:
    """Fill the block on what was measured on a GPU."""
    found = gpu_tables.sections(load(RESULTS / "gpu.json"))
    shown = [f"{heading}\n\n{table(*rows)}" if rows else heading for heading, rows in found]
    replace_block(ROOT / "docs" / "performance.md", "gpu", "\n\n".join(shown) or gpu_tables.NOT_RUN)


def subspaces() -> None:
    """Fill the blocks on what the methods learn, and on what watching them costs."""
    page = ROOT / "docs" / "functional-subspace.md"
    records = load(RESULTS / "subspace.json")
    if records:
        header = ["adaptation", "functions", "mean drift", "effective rank", "90% of the energy", "99%"]
        shown = table(header, subspace_tables.dimension_rows(records))
        replace_block(page, "dimension", f"{shown}\n\n{machine(records)}")
        header = ["amplitude, frequency", "share of B A, mean over layers", "share of the logits' change"]
        replace_block(page, "sinter", table(header, subspace_tables.sinter_rows(records)))
        header = ["activation", *(f"step {s}" for s in (2, 6, 10, 14, 16)), "last training loss"]
        replace_block(page, "residual", table(header, subspace_tables.residual_rows(records)))
        subspace_tables.figure(records, page.with_suffix(".png"))
    runs = load(RESULTS / "healthy_and_sick.json")
    if runs:
        header = ["run", "right, validation", "training loss", "drift at the end, layers", "largest mean drift"]
        header += ["mean slope / pretrained, end", "largest", "inputs outside the fit"]
        shown = table(header, subspace_tables.run_rows(runs))
        replace_block(ROOT / "docs" / "reading-tensorboard.md", "runs", f"{shown}\n\n{machine(runs)}")
    overhead = load(RESULTS / "callback_overhead.json")
    if overhead:
        header = ["model, NoRA++", "steps", "callback's share of the time", "start, s", "last figures, s"]
        shown = table(header, subspace_tables.overhead_rows(overhead))
        replace_block(ROOT / "docs" / "reading-tensorboard.md", "overhead", f"{shown}\n\n{machine(overhead)}")


def linearisations() -> None:
    """Fill the blocks on methods inside peft, on several adapters, and on what corrections of matrices take over."""
    if records := load(RESULTS / "inside_peft.json"):
        header = ["method", "put in: attach, s (2 calls)", "inside peft, s (2 calls)", "step: inside peft / attach"]
        shown = f"{table(header, performance_tables.inside_peft_rows(records))}\n\n{machine(records)}"
        replace_block(ROOT / "docs" / "from-peft.md", "inside-peft", shown)
    if records := load(RESULTS / "several_adapters.json"):
        header = ["method", "memory of one", "`use`", "ten attached / one attached", "ten by rows / one adapter"]
        header += ["the same in peft", "ten by rows / ten passes", "largest difference of logits"]
        shown = f"{table(header, performance_tables.several_adapters_rows(records))}\n\n{machine(records)}"
        replace_block(ROOT / "docs" / "several-adapters.md", "several-adapters", shown)
    if records := load(RESULTS / "larger_than_memory.json"):
        header = ["text", "tokens", "rows are held", "memory", "tokenising", "rows read a second"]
        shown = f"{table(header, performance_tables.larger_than_memory_rows(records))}\n\n{machine(records)}"
        replace_block(ROOT / "docs" / "scaling.md", "larger-than-memory", shown)
    page = ROOT / "docs" / "estimates.md"
    if records := load(RESULTS / "estimates.json"):
        header = [
            "recipe",
            "with",
            "memory of a step",
            "estimated / measured",
            "time of a step",
            "estimated / measured",
        ]
        shown = f"{table(header, performance_tables.estimates_rows(records))}\n\n{machine(records)}"
        replace_block(page, "estimates", shown)
    if records := load(RESULTS / "shared_estimates.json"):
        header = ["recipe", "with", "DDP, memory of a device", "estimated / measured"]
        header += ["FSDP2, memory of a device", "estimated / measured"]
        shown = f"{table(header, performance_tables.shared_estimates_rows(records))}\n\n{machine(records)}"
        replace_block(page, "estimates-shared", shown)
    if records := load(RESULTS / "estimates_published.json"):
        header = ["method", "memory, published", "estimated", "time, published", "estimated"]
        replace_block(page, "estimates-published", table(header, performance_tables.published_rows(records)))
    if records := load(RESULTS / "linearisation.json"):
        header = ["run", "adapted", "activations taken out", "with corrections", "share of the difference"]
        header += ["error of the outputs", "largest error of a layer"]
        shown = f"{table(header, subspace_tables.linearisation_rows(records))}\n\n{machines([[r] for r in records])}"
        replace_block(ROOT / "docs" / "from-peft.md", "linearisation", shown)


def language() -> None:
    """Fill the blocks of the language measurements."""
    page = ROOT / "docs" / "results-language.md"
    every = ROOT / ALL_TABLES
    measured = {task: load(RESULTS / f"language_{task}.json") for task in language_tables.TASKS}
    measured = {task: records for task, records in measured.items() if records}
    for task, records in measured.items():
        header, rows = language_tables.full_table(records, task)
        replace_block(every, task, f"{table(header, rows)}\n\n{machine(records)}")
        shown = table(*language_tables.page_table(records, task))
        replace_block(page, task, f"{shown}\n\n{language_tables.notes(records, task)}".strip())
    if measured:
        header = ["arm", *(f"{task}, validation loss by rate" for task in measured)]
        replace_block(every, "language-rates", table(header, language_tables.rates(measured)))
        replace_block(page, "machine", machines(list(measured.values())))
        language_tables.figure(measured, ROOT / "docs" / "language.png")


def regimes() -> None:
    """Fill the blocks of preferences, reinforcement and speculative decoding."""
    page = ROOT / "docs" / "results-language.md"
    r = regime_tables
    if records := load(RESULTS / "preferences.json"):
        shown = table(r.PREFERENCES, r.preference_rows(records))
        replace_block(page, "preferences", f"{shown}\n\n{machine(records)}")
    if records := load(RESULTS / "reinforcement.json"):
        shown = f"{table(r.REINFORCEMENT, r.reinforcement_rows(records))}\n\n![reward against steps](reinforcement.png)"
        replace_block(page, "reinforcement", f"{shown}\n\n{machine(records)}")
        r.reinforcement_figure(records, ROOT / "docs" / "reinforcement.png")
    if records := load(RESULTS / "speculative.json"):
        replace_block(page, "distilled", table(r.DISTILLED, r.distilled_rows(records)))
        replace_block(page, "decoded", f"{table(r.DECODED, r.decoded_rows(records))}\n\n{machine(records)}")


if __name__ == "__main__":
    main()
