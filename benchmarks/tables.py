"""Write the tables and figures of README.md and docs/ from benchmarks/results.

python -m benchmarks.tables
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import bounds, language_tables, performance_tables, regime_tables, subspace_tables
from benchmarks.arms import names
from benchmarks.results_file import RESULTS, load

ROOT = Path(__file__).parents[1]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def accuracy_table(records: list[dict[str, Any]]) -> str:
    """One row an arm: full protocol with its binomial error, few-shot mean and deviation over the seeds."""
    rows = []
    for arm, name in names("accuracy").items():
        runs = [r for r in records if r["arm"] == arm]
        if not runs:
            continue
        full = [r for r in runs if r["protocol"] == "full"]
        few = [r for r in runs if r["protocol"] == "few"]
        # The rate is open until all candidates have been compared and one was used.
        rate = f"{(full or few)[0]['rate']:g}" if full or few else "open"
        row = [name, f"{runs[0]['trainable_without_head']:,}", rate]
        row.append(" ".join(f"{r['accuracy']:.3f} ± {_binomial(r):.3f}" for r in full) or "not run")
        values = [r["accuracy"] for r in few]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:.3f}" for v in values)
        row.append(f"{statistics.mean(values):.3f}{spread} ({each})" if values else "not run")
        row.append(f"{max(r['peak_memory_mib'] for r in runs):,}")
        rows.append(row)
    header = ["arm", "trained, without head", "rate", "10,000 images", "500 images (each seed)", "peak memory, MiB"]
    return table(header, rows)


def _binomial(record: dict[str, Any]) -> float:
    p = record["accuracy"]
    return math.sqrt(p * (1 - p) / record["n"])


def rates_table(records: list[dict[str, Any]]) -> str:
    """Validation accuracy of every learning rate tried."""
    tried = [r for r in records if r["protocol"] == "rate"]
    rows = [
        [name, ", ".join(f"{r['rate']:g}: {r['accuracy']:.3f}" for r in tried if r["arm"] == arm)]
        for arm, name in names("accuracy").items()
        if any(r["arm"] == arm for r in tried)
    ]
    return table(["arm", "validation accuracy by rate (n = 1,000)"], rows)


def machine(records: list[dict[str, Any]]) -> str:
    """Where and with what the latest record was measured."""
    e = records[-1]["environment"]
    computes = {True: ", with bfloat16", False: ", without bfloat16"}.get(e.get("bfloat16"), "")  # type: ignore[arg-type]
    versions = ", ".join(f"{k} {e[k]}" for k in ("torch", "lightning", "timm", "transformers") if k in e)
    return f"{e['cores']} cores of {e['cpu']}{computes}, {e['threads']} thread(s) a process, {versions}, {e['date']}."


def accuracy_figure(records: list[dict[str, Any]], path: Path) -> None:
    """Both protocols side by side: bars with standard errors, points for the seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, protocol, title in zip(panels, ("full", "few"), ("10,000 images", "500 images, each seed"), strict=True):
        called = names("accuracy")
        arms = [a for a in called if any(r["arm"] == a and r["protocol"] == protocol for r in records)]
        for row, arm in enumerate(arms):
            runs = [r for r in records if r["arm"] == arm and r["protocol"] == protocol]
            mean = statistics.mean(r["accuracy"] for r in runs)
            error = _binomial(runs[0])
            panel.barh(row, mean, xerr=error if len(runs) == 1 else 0, color="#7a9cc6")
            if len(runs) > 1:
                panel.plot([r["accuracy"] for r in runs], [row] * len(runs), "k.", markersize=5)
        panel.set_yticks(range(len(arms)), [called[a] for a in arms], fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel("test accuracy")
        panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between <!-- name --> and <!-- /name --> in a page.

    Raises:
        SystemExit: The page has no such block.
    """
    source = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(source):
        raise SystemExit(f"error: {path} has no block <!-- {name} -->")
    path.write_text(pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", source), encoding="utf-8")


def main() -> None:
    """Fill every block."""
    accuracy = load(RESULTS / "cifar10_accuracy.json")
    results = ROOT / "docs" / "results.md"
    if accuracy:
        replace_block(results, "accuracy", f"{accuracy_table(accuracy)}\n\n{machine(accuracy)}")
        replace_block(results, "rates", rates_table(accuracy))
        replace_block(ROOT / "README.md", "results", f"{accuracy_table(accuracy)}\n\n{machine(accuracy)}")
        accuracy_figure(accuracy, ROOT / "docs" / "accuracy.png")
    language()
    regimes()
    subspaces()
    performance()


def performance() -> None:
    """Fill the blocks on speed and memory."""
    page = ROOT / "docs" / "performance.md"
    header = ["quantity", "at most", "measured (quartiles)", "met"]
    replace_block(page, "bounds", table(header, [bound.row() for bound in bounds.bounds()]))
    over = "time / compiled GELU's"
    sections: dict[str, tuple[str, list[str], Callable[[list[dict[str, Any]]], list[list[str]]]]] = {
        "rational": (
            "rational_speed",
            ["variant", f"float32, {over}", f"bfloat16, {over}", "bound"],
            performance_tables.rational_rows,
        ),
        "peft": (
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
            lambda records: performance_tables.peft_rows(records, load(RESULTS / "peft_memory.json")),
        ),
        "shares": (
            "time_shares",
            ["step", *(f"{kind}, ms" for kind in performance_tables.KINDS), "time / peft's"],
            performance_tables.share_rows,
        ),
        "loran": (
            "loran_speed",
            ["method", "tokens", "seconds", "time / LoRA's", "time / the branch's", "allocated, MiB", "resident, MiB"],
            performance_tables.loran_rows,
        ),
        "inference": (
            "inference",
            ["variant", "ViT-S, time / base's", "generation, time / base's", "tokens a second"],
            performance_tables.inference_rows,
        ),
        "startup": (
            "startup",
            ["method", "attach to a LLaMA of 8B on meta, s", "load into ViT-S, s", "file, bytes: values + rest"],
            performance_tables.startup_rows,
        ),
    }
    for name, (file, header, rows) in sections.items():
        if records := load(RESULTS / f"{file}.json"):
            replace_block(page, name, f"{table(header, rows(records))}\n\n{machine(records)}")
    header = ["step at r = 8", "processor with bfloat16, each run", "without, each run"]
    repeated = performance_tables.repeated_rows(load(RESULTS / "against_peft.json"))
    replace_block(page, "repeated", table(header, repeated))
    steps = load(RESULTS / "step_time.json")
    for model in dict.fromkeys(r["model"] for r in steps):
        shown = table(*performance_tables.step_table(steps, model))
        of = {p: [r for r in steps if (r["model"], r["precision"]) == (model, p)] for p in ("fp32", "bf16")}
        where = "\n\n".join(f"{precision}: {machine(records)}" for precision, records in of.items() if records)
        replace_block(page, f"steps-{model}", f"{shown}\n\n{where}")
    once = {r["what"]: r["seconds"]["median"] for r in load(RESULTS / "startup.json") if "seconds" in r}
    if once:
        importing = f"`import lit_adapters` beyond torch takes {once['import']:.2f} s (bound {bounds.IMPORT_SECONDS})"
        building = f"building the rational kernel {once['build']:.1f} s"
        replace_block(page, "import", f"{importing}, {building}, once for a form of denominator and its degrees.")
    if records := load(RESULTS / "growth.json"):
        header = ["method", *dict.fromkeys(r["quantity"] for r in records)]
        shown = table(header, performance_tables.growth_rows(records))
        replace_block(page, "growth", f"{shown}\n\n![seconds a step](growth.png)\n\n{machine(records)}")
        performance_tables.growth_figure(records, ROOT / "docs" / "growth.png")


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


def language() -> None:
    """Fill the blocks of the language measurements."""
    page = ROOT / "docs" / "results-language.md"
    measured = {task: load(RESULTS / f"language_{task}.json") for task in language_tables.TASKS}
    measured = {task: records for task, records in measured.items() if records}
    for task, records in measured.items():
        columns = language_tables.TASKS[task]
        shown = table(language_tables.header(*columns), language_tables.rows_of(records, *columns))
        notes = f"{language_tables.control(records, columns[1])} {machine(records)}".strip()
        replace_block(page, task, f"{shown}\n\n{notes}")
    if measured:
        header = ["arm", *(f"{task}, validation loss by rate" for task in measured)]
        replace_block(page, "rates", table(header, language_tables.rates(measured)))
        language_tables.figure(measured, ROOT / "docs" / "language.png")


def regimes() -> None:
    """Fill the blocks of preferences, reinforcement and speculative decoding."""
    page = ROOT / "docs" / "regimes.md"
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
