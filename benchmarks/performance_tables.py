"""The tables on speed and memory, of docs/performance.md and results/tables.md, and the plot of how cost grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.arms import ARMS, STEPS, names
from benchmarks.bounds import BLOCKS, PEFT_STEP, RATIONAL, WHOLE_JOB
from benchmarks.results_file import span, with_spread
from lit_adapters.learned.pictures import save_figure

Record = dict[str, Any]

# Where the time of a step goes, see time_shares.py.
KINDS = ("wide products", "thin products", "attention", "copies and casts", "AdamW", "all else", "Python")


def _latest(records: list[Record], key: Callable[[Record], Any]) -> list[Record]:
    """The last record of every key, in the order in which keys first came."""
    return list({key(r): r for r in records}.values())


def rational_rows(records: list[Record]) -> list[list[str]]:
    """One row for each variant, one column for each dtype."""
    latest = _latest([r for r in records if r["device"] == "cpu"], lambda r: (r["variant"], r["dtype"]))
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in latest):
        of = {r["dtype"]: r for r in latest if r["variant"] == variant}
        cells = [with_spread(of[d]["over_gelu"]) if d in of else "not run" for d in ("float32", "bfloat16")]
        rows.append([variant, *cells, _rational_bound(variant)])
    return rows


def unbounded_rationals(records: list[Record]) -> str:
    """The variant without a bound, and which GELU was the faster one, in two sentences."""
    (formula,) = (row for row in rational_rows(records) if row[0] == "eager formula")
    faster = {r["dtype"]: r["faster"] for r in records if r["device"] == "cpu" and "faster" in r}
    which = " and ".join(f"{name} in {dtype}" for dtype, name in faster.items())
    return (
        f"The faster one was {which}. Without a bound: the eager formula, {formula[1]} in float32 and {formula[2]} in "
        "bfloat16."
    )


def _rational_bound(variant: str) -> str:
    if variant == "blocks":
        return " and ".join(f"{limit:.2f} ({dtype})" for dtype, limit in BLOCKS.items())
    return f"{RATIONAL[variant].limit:.2f}" if variant in RATIONAL else ""


def combination(record: Record) -> tuple[str, bool, bool, int, str]:
    """Model, checkpointing, whether DoRA, rank and precision, in which order rows come."""
    is_dora = record["method"] == "dora"
    return record["model"], record["checkpointing"], is_dora, record["rank"], record["precision"]


def peft_rows(records: list[Record], memory: list[Record]) -> list[list[str]]:
    """One row for each combination: times and resident memory, then what tensors take, where either was measured."""
    times = {combination(r): r for r in records}
    taken = {combination(r): r for r in memory}
    rows = []
    for key in sorted(times | taken):
        either = times.get(key) or taken[key]
        checkpointing = ", checkpointing" if either["checkpointing"] else ""
        name = f"{ARMS[either['method']].name}, r = {either['rank']}"
        row = [either["model"], name, f"{either['precision']}{checkpointing}"]
        rows.append([*row, *_peft_times(times.get(key)), *_peft_memory(taken.get(key))])
    return rows


PEFT_PAGE = ("step / frozen", "resident, MiB", "allocated, MiB")


def peft_page_rows(records: list[Record], memory: list[Record]) -> list[list[str]]:
    """One row for each model and method at r = 8: in both precisions the cells of `PEFT_PAGE`."""
    times = {combination(r): r for r in records}
    taken = {combination(r): r for r in memory}
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        for method in ("lora", "dora"):
            row = [f"{model}, {ARMS[method].name}"]
            for precision in ("fp32", "bf16"):
                key = (model, False, method == "dora", 8, precision)
                _, _, over_frozen, _, resident = _peft_times(times.get(key))
                row += [over_frozen, resident, _peft_memory(taken.get(key))[1]]
            rows.append(row)
    return rows


def _peft_times(r: Record | None) -> list[str]:
    if r is None:
        return ["not run", "", "", "", ""]
    bounded = r["rank"] == 8 and not r["checkpointing"]
    bound = f"{PEFT_STEP[r['method'], r['precision']]:.2f}" if bounded else ""
    return [
        f"{r['seconds']['median']:.3f} / {r['seconds_peft']['median']:.3f}",
        with_spread(r["ratio"]),
        " / ".join(f"{r[n]['median']:.2f}" for n in ("over_frozen", "peft_over_frozen") if n in r),
        bound,
        f"{r['memory_mib']} / {r['memory_mib_peft']}",
    ]


def _peft_memory(r: Record | None) -> list[str]:
    if r is None:
        return ["not run", "not run"]
    saved = [f"{of['saved_mib']:.0f} ({of['largest_saved_mib']:.1f})" for of in (r["ours"], r["peft"])]
    return [" / ".join(saved), f"{r['ours']['allocated_mib']:.0f} / {r['peft']['allocated_mib']:.0f}"]


def repeated_rows(records: list[Record]) -> list[list[str]]:
    """One row for each combination at r = 8: the ratio of every run, on processors with bfloat16 and without."""
    runs: dict[tuple[str, bool, bool, int, str], tuple[list[str], list[str]]] = {}
    for r in (r for r in records if r["rank"] == 8 and not r["checkpointing"]):
        of = runs.setdefault(combination(r), ([], []))
        of[0 if r["environment"]["bfloat16"] else 1].append(f"{r['ratio']['median']:.2f}")
    rows = []
    for (model, _, dora, _, precision), of in sorted(runs.items()):
        cells = [", ".join(ratios) or "not run" for ratios in of]
        rows.append([f"{model}, {'DoRA' if dora else 'LoRA'}, {precision}", *cells])
    return rows


def share_rows(records: list[Record]) -> list[list[str]]:
    """One row for each combination: milliseconds of a step, ours / peft's, by kind of operator."""
    rows = []
    latest = _latest(records, lambda r: (r["model"], r["method"] == "dora", r["precision"]))
    for r in sorted(latest, key=lambda r: (r["model"], r["method"] == "dora", r["precision"])):
        ours, theirs = r["ours"], r["peft"]
        cells = [f"{ours[kind]:.0f} / {theirs[kind]:.0f}" for kind in KINDS]
        cells.append(f"{sum(ours.values()) / sum(theirs.values()):.2f}")
        rows.append([f"{r['model']}, {ARMS[r['method']].name}, {r['precision']}", *cells])
    return rows


def step_table(records: list[Record], model: str) -> tuple[list[str], list[list[str]]]:
    """Header, and one row for each arm: samples a second, ratios and memory by precision; then the rest."""
    latest = _latest([r for r in records if r["model"] == model], lambda r: (r["arm"], r["precision"]))
    base = "frozen" if model == "vit" else "lora"
    precisions = [p for p in ("fp32", "bf16") if any(r["precision"] == p for r in latest)]
    rows = []
    for arm, name in names(STEPS[model]).items():
        of = {r["precision"]: r for r in latest if r["arm"] == arm}
        if not of:
            continue
        row = [name]
        for r in (of[p] for p in precisions):
            row += [f"{r['batch'] / r['seconds']['median']:.1f}", with_spread(r[f"over_{base}"])]
            row += [f"{r['over_full']['median']:.2f}", f"{r['peak_memory_mib']:,}"]
        r = of[precisions[0]]
        row += [f"{r['first_step_seconds']:.1f}", f"{r['trainable']:,}", f"{r['state_bytes'] / 2**20:,.1f}"]
        rows.append([*row, f"{r['file_bytes'] / 1024:,.0f}"])
    against = "frozen" if model == "vit" else "LoRA"
    each = [[f"{p}: samples/s", f"/ {against}", "/ full", "peak, MiB"] for p in precisions]
    last = ["first step, s", "trained", "optimiser, MiB", "file, KiB"]
    return ["arm", *(name for names in each for name in names), *last], rows


def step_page_table(records: list[Record], model: str) -> tuple[list[str], list[list[str]]]:
    """The columns of `step_table` that a page shows; ratios without their quartiles."""
    header, rows = step_table(records, model)
    left_out = [i for i, name in enumerate(header) if name in ("/ full", "first step, s")]
    kept = [i for i in range(len(header)) if i not in left_out]
    return [header[i] for i in kept], [[row[i].partition(" (")[0] if i else row[i] for i in kept] for row in rows]


def loran_rows(records: list[Record]) -> list[list[str]]:
    """One row for each arm and number of tokens."""
    names = {"lora": "LoRA", "loran": "LoRAN", "branch": "LoRAN as a separate branch"}
    rows = []
    for r in _latest(records, lambda r: (r["tokens"], r["arm"])):
        row = [names[r["arm"]], f"{r['tokens']:,}", f"{r['seconds']['median']:.3f}"]
        rows.append([*row, *(with_spread(r[k]) for k in ("over_lora", "over_branch"))])
        rows[-1] += [f"{r['allocated_mib']:.0f}", f"{r['memory_mib']}"]
    return rows


def inference_rows(records: list[Record]) -> list[list[str]]:
    """One row for each variant: forward passes, then generation."""
    latest = _latest(records, lambda r: (r["model"], r["variant"]))
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in latest):
        of = {r["model"]: r for r in latest if r["variant"] == variant}
        speed = f"{of['llama']['tokens_per_second']:.1f}" if "llama" in of else "not run"
        rows.append([variant, *(with_spread(of[m]["over_base"]) if m in of else "not run" for m in ("vit", "llama"))])
        rows[-1].append(speed)
    return rows


def startup_rows(records: list[Record]) -> list[list[str]]:
    """One row for each method."""
    rows = []
    for r in _latest([r for r in records if "attach" in r], lambda r: r["what"]):
        extra = r["file_bytes"] - r["value_bytes"]
        rows.append([r["what"], with_spread(r["attach"]), with_spread(r["load"]), f"{r['value_bytes']:,} + {extra:,}"])
    return rows


def beginning(records: list[Record]) -> str:
    """What the start costs, from the fastest method to the slowest, in sentences."""
    once = {r["what"]: r["seconds"]["median"] for r in records if "seconds" in r}
    methods = _latest([r for r in records if "attach" in r], lambda r: r["what"])
    attach = [r["attach"]["median"] for r in methods]
    load = [r["load"]["median"] for r in methods]
    rest = [(r["file_bytes"] - r["value_bytes"]) / 1024 for r in methods]
    return (
        f"`import lit_adapters` beyond torch takes {once['import']:.2f} s, building the rational kernel "
        f"{once['build']:.1f} s, once for a form of denominator and its degrees. Attaching to a LLaMA of 8B on meta "
        f"takes {span(min(attach), max(attach))} s, loading into ViT-S {span(min(load), max(load))} s. An adapter "
        f"file has {span(min(rest), max(rest), 0)} KiB beyond its values."
    )


def exponent(record: Record) -> float:
    """k of seconds = c size^k, by least squares in logarithms."""
    x, y = ([math.log(v) for v in record[name]] for name in ("sizes", "medians"))
    return statistics.linear_regression(x, y).slope


def growth_rows(records: list[Record]) -> list[list[str]]:
    """One row for each method, one column for each quantity: the exponent of its fit."""
    latest = _latest(records, lambda r: (r["quantity"], r["method"]))
    quantities = list(dict.fromkeys(r["quantity"] for r in latest))
    rows = []
    for method in dict.fromkeys(r["method"] for r in latest):
        of = {r["quantity"]: r for r in latest if r["method"] == method}
        rows.append([method, *(f"{exponent(of[q]):.2f}" if q in of else "" for q in quantities)])
    return rows


def growth_figure(records: list[Record], path: Path) -> None:
    """Seconds of a step against each quantity, both axes logarithmic."""
    latest = _latest(records, lambda r: (r["quantity"], r["method"]))
    quantities = list(dict.fromkeys(r["quantity"] for r in latest))
    figure = Figure(figsize=(2.6 * len(quantities), 3.2), layout="constrained")
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for panel, quantity in zip(panels, quantities, strict=True):
        for r in (r for r in latest if r["quantity"] == quantity):
            panel.loglog(r["sizes"], r["medians"], "o-", markersize=3, linewidth=1, label=r["method"])
        sizes = next(r["sizes"] for r in latest if r["quantity"] == quantity)
        panel.set_xticks(sizes, [str(s) for s in sizes], fontsize=7)
        panel.minorticks_off()
        panel.set_xlabel(quantity, fontsize=8)
    panels[0].set_ylabel("seconds a step")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].legend(fontsize=6)
    save_figure(figure, path, dpi=110)


def whole_job_rows(records: list[Record]) -> list[list[str]]:
    """One row for each job: the last record, bold where it takes more of the peer's time or memory than it may."""
    rows = []
    for r in _latest(records, lambda r: r["job"]):
        over, ours, theirs = r["over_peer"], r["ours"], r["theirs"]
        rows.append(
            [
                f"{r['job']}, beside {r['peer']}",
                f"{ours['seconds']['median']:.0f} / {theirs['seconds']['median']:.0f}",
                _bounded(over["seconds"], WHOLE_JOB["seconds"].limit),
                with_spread(over["steady_seconds"]) if "steady_seconds" in over else "no steps",
                f"{ours['per_second']:,.0f} / {theirs['per_second']:,.0f} {r['unit']}",
                _bounded(over["peak_mib"], WHOLE_JOB["peak_mib"].limit),
            ]
        )
    return rows


def whole_job_stages(records: list[Record]) -> list[list[str]]:
    """Two rows for each job: where the seconds go, ours and the peer's.

    Both sides name the stages before the first step in their own way, so these are one.
    """
    rows = []
    for r in _latest(records, lambda r: r["job"]):
        for name, side in (("ours", r["ours"]), (r["peer"], r["theirs"])):
            medians = {stage: seconds["median"] for stage, seconds in side["stages"].items()}
            if "first step" in medians:
                names = list(medians)
                until = names[: names.index("first step") + 1]
                medians = {"until the end of the first step": sum(medians.pop(stage) for stage in until)} | medians
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in medians.items())
            rows.append([f"{r['job']}, {name}", stages])
    return rows


def _bounded(ratio: dict[str, Any], limit: float) -> str:
    text = with_spread(ratio)
    return f"**{text}**" if round(ratio["median"], 2) > limit else text


def inside_peft_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What our methods cost inside peft, against `attach`."""
    return [
        [
            r["method"],
            f"{r['begin']['attach']['median']:.2f}",
            f"{r['begin']['peft']['median']:.2f}",
            with_spread(r["step_over_attach"], 3),
        ]
        for r in records
    ]


def estimates_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What was estimated of steps, and what they took."""
    return [
        [
            *_recipe_and_settings(r),
            *_memory(r),
            f"{r['seconds']:.2f} s",
            f"{r['estimated_seconds'] / r['seconds']:.2f}",
        ]
        for r in records
    ]


def shared_estimates_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """The same of memory where two devices share the work, by DDP and by FSDP2."""
    memory: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for r in records:
        memory.setdefault(tuple(_recipe_and_settings(r)), {})[r["strategy"]] = _memory(r)
    return [[*key, *of.get("ddp", ["", ""]), *of.get("fsdp", ["", ""])] for key, of in memory.items()]


def _recipe_and_settings(record: dict[str, Any]) -> list[str]:
    recipe = "/".join(record["recipe"].split("/")[1:])
    return [recipe, ", ".join(setting.split(".")[-1] for setting in record["settings"]) or "as it is"]


def _memory(record: dict[str, Any]) -> list[str]:
    ratio = record["estimated_mib"] / record["allocated_mib"]
    return [f"{record['allocated_mib']:,.0f} MiB", f"{ratio:.2f}"]


def published_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What was estimated of others' runs, beside what they published."""
    return [
        [
            r["method"],
            f"{r['gib']} GiB" if r["gib"] else "not told",
            f"{r['estimated_gib']:.1f} GiB",
            f"{r['seconds']:,} s",
            f"{r['estimated_seconds']:,.0f} s at least",
        ]
        for r in records
    ]


def larger_than_memory_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What training data take in memory, and on the disk."""
    return [
        [
            f"{r['gigabytes']:g} GB",
            f"{r['tokens'] / 1e6:.0f} million",
            "on the disk" if r["on_disk"] else "in memory",
            f"{r['memory'] / 2**20:,.0f} MiB",
            f"{r['tokenising_seconds']:,.0f} s",
            f"{r['batches'] * r['batch_size'] / r['batches_seconds']:,.0f}",
        ]
        for r in records
    ]


def several_adapters_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What ten adapters cost, and a batch in which each row has its own."""
    return [
        [
            r["method"],
            f"{r['adapter_mib']:.1f} MiB of {r['model_mib']:.0f}",
            f"{r['seconds']['use']['median'] / 2 * 1e3:.0f} ms",
            with_spread(r["ten_over_one"], 2),
            with_spread(r["rows_over_one"], 2),
            with_spread(r["peft_rows_over_one"], 2) if r["peft_rows_over_one"] else "not in peft",
            with_spread(r["rows_over_separate"], 2),
            f"{r['difference']:.0e}",
        ]
        for r in records
    ]
