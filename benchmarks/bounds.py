"""Every bound on speed and memory, and what was measured last beside it: the first table of docs/performance.md."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.arms import ARMS
from benchmarks.results_file import RESULTS, load, with_spread

Record = dict[str, Any]


class Limit(NamedTuple):
    """The quantity that a bound is on, and the most that it may be."""

    quantity: str
    limit: float


# By the variant of benchmarks/rational_speed.py: time over that of eager or compiled GELU, whichever is faster.
RATIONAL = {
    "rational": Limit("Rational function / GELU", 1.20),
    "without coefficient gradients": Limit("the same without coefficient gradients", 1.00),
    "groups of 24 channels": Limit("the same in groups of 24 channels", 1.40),
    "anchored": Limit("the same, anchored", 1.35),
}
BLOCKS = {"float32": 3.5, "bfloat16": 4.0}  # the same without a C++ compiler
# By precision and what is compared with: a step of NoRA over that of the frozen model or of full fine-tuning.
NORA_STEP = {("fp32", "frozen"): 1.05, ("bf16", "frozen"): 1.07, ("fp32", "full"): 0.75, ("bf16", "full"): 0.85}
# By method and precision: a step over peft's.
PEFT_STEP = {("lora", "fp32"): 0.88, ("lora", "bf16"): 0.90, ("dora", "fp32"): 0.83, ("dora", "bf16"): 0.72}
OPTIMIZER_STEP = 1.15  # a whole step with an optimiser of pairs over the same with AdamW
# By what is measured of a whole job, ours over the peer's.
WHOLE_JOB = {
    "seconds": Limit("A whole job / the peer's", 0.85),
    "peak_mib": Limit("Its peak of resident memory / the peer's", 1.00),
}
IMPORT_SECONDS = 0.3  # of `import lit_adapters`, beyond torch
MODELS = {"vit": "ViT", "llama": "LLaMA", "layer": "layer"}


class Bound(NamedTuple):
    """A quantity that may be at most `limit`.

    Attributes:
        quantity: What is measured.
        limit: The most that it may be.
        measured: Of each thing measured its name, its value and the value as text.
    """

    quantity: str
    limit: float
    measured: list[tuple[str, float, str]]

    def row(self) -> list[str]:
        """The quantity, its limit and the values, bold above the limit (to two decimals).

        Of more than four values within the limit the largest stands for all.
        """
        missed = [m for m in self.measured if round(m[1], 2) > self.limit]
        listed = self.measured
        if len(listed) > 4:
            listed = missed or [max(listed, key=lambda m: m[1])]
        shown = []
        for measured in listed:
            name, _, text = measured
            cell = f"{name} {text}".strip()
            shown.append(f"**{cell}**" if measured in missed else cell)
        if len(listed) < len(self.measured):
            shown[0] = f"{'missed' if missed else 'largest'} of {len(self.measured)}: {shown[0]}"
        return [self.quantity, f"{self.limit:.2f}", "; ".join(shown) or "not run"]


def _last(file: str, **key: Any) -> list[Record]:
    """The last record that has these values, or none."""
    return [r for r in load(RESULTS / f"{file}.json") if key.items() <= r.items()][-1:]


def _ratio(name: str, records: list[Record], field: str) -> list[tuple[str, float, str]]:
    return [(name, r[field]["median"], with_spread(r[field])) for r in records]


def _share(name: str, part: float, whole: float) -> tuple[str, float, str]:
    return name, part / whole, f"{part / whole:.2f}"


def bounds() -> list[Bound]:
    """All bounds, in the order of the table."""
    return [*_rational(), *_nora(), *_peft(), *_loran(), *_optimizers(), *_use(), *_whole_jobs(), *_beginning()]


def _rational() -> list[Bound]:
    def over_gelu(variant: str, dtype: str, name: str) -> list[tuple[str, float, str]]:
        return _ratio(name, _last("rational_speed", variant=variant, dtype=dtype, device="cpu"), "over_gelu")

    found = [
        Bound(quantity, limit, [m for d in BLOCKS for m in over_gelu(variant, d, d)])
        for variant, (quantity, limit) in RATIONAL.items()
    ]
    for dtype, limit in BLOCKS.items():
        found.append(Bound(f"the same without a C++ compiler, {dtype}", limit, over_gelu("blocks", dtype, "")))
    return found


def _nora() -> list[Bound]:
    names = {"frozen": "frozen model", "full": "full fine-tuning"}
    return [
        Bound(
            f"NoRA's step of ViT-S / {names[other]}, {precision}",
            limit,
            _ratio("", _last("step_time", model="vit", arm="nora", precision=precision), f"over_{other}"),
        )
        for (precision, other), limit in NORA_STEP.items()
    ]


def _peft() -> list[Bound]:
    found = []
    for (method, precision), limit in PEFT_STEP.items():
        key = {"method": method, "precision": precision, "rank": 8, "checkpointing": False}
        of = {name: _last("against_peft", model=model, **key) for model, name in MODELS.items()}
        times = [m for name, records in of.items() for m in _ratio(name, records, "ratio")]
        found.append(Bound(f"{ARMS[method].name}'s step / peft's, {precision}", limit, times))
    for precision in ("fp32", "bf16"):
        key = {"method": "dora", "precision": precision, "rank": 8, "checkpointing": False}
        tensors = []
        resident = []
        for model, name in MODELS.items():
            for r in _last("peft_memory", model=model, **key):
                tensors.append(_share(name, r["ours"]["allocated_mib"], r["peft"]["allocated_mib"]))
            for r in _last("against_peft", model=model, **key):
                resident.append(_share(name, r["memory_mib"], r["memory_mib_peft"]))
        found.append(Bound(f"DoRA's tensors / peft's, {precision}", 0.70, tensors))
        found.append(Bound(f"DoRA's resident memory / peft's, {precision}", 0.70, resident))
    return found


def _optimizers() -> list[Bound]:
    found = []
    for arm in ("lora_rite", "loft"):
        times = [
            m
            for model, name in (("vit", "ViT"), ("smollm2", "SmolLM2"))
            for precision in ("fp32", "bf16")
            for m in _ratio(
                f"{name} {precision}", _last("step_time", model=model, arm=arm, precision=precision), "over_lora"
            )
        ]
        found.append(Bound(f"A step of LoRA with {ARMS[arm].optimizer.__name__} / with AdamW", OPTIMIZER_STEP, times))
    return found


def _loran() -> list[Bound]:
    many = 2015
    few = 260
    of = {(arm, n): _last("loran_speed", arm=arm, tokens=n) for arm in ("lora", "loran") for n in (many, few)}
    memory = [
        _share(f"{what}, {n:,} tokens", ours[field], lora[field])
        for field, what in (("allocated_mib", "tensors"), ("memory_mib", "resident"))
        for n in (many, few)
        for ours, lora in zip(of["loran", n], of["lora", n], strict=True)
    ]
    return [
        *(
            Bound(f"LoRAN's step / LoRA's, {n:,} tokens", limit, _ratio("", of["loran", n], "over_lora"))
            for n, limit in ((many, 1.40), (few, 1.65))
        ),
        Bound(
            "LoRAN's step / a separate branch's",
            0.65,
            [m for n in (many, few) for m in _ratio(f"{n:,} tokens", of["loran", n], "over_branch")],
        ),
        Bound("LoRAN's memory / LoRA's", 1.05, memory),
    ]


def _use() -> list[Bound]:
    def ratios(variant: str, name: str = "") -> list[tuple[str, float, str]]:
        of = {"ViT-S": "vit", "generation": "llama"}
        return [
            m
            for use, model in of.items()
            for m in _ratio(f"{name} {use}".strip(), _last("inference", model=model, variant=variant), "over_base")
        ]

    low_rank = ("lora", "dora", "afa", "loran", "nora_plus_plus")
    generation = {ARMS[arm].name: _last("inference", model="llama", variant=arm) for arm in low_rank}
    unmerged = [m for name, records in generation.items() for m in _ratio(name, records, "over_base")]
    merged = {ARMS[arm].name: f"{arm}, merged" for arm in ("lora", "dora", "afa", "loran")}
    return [
        Bound("Second copy of the base, in use / the base: chance", 1.02, ratios("base, again")),
        Bound("Merged, in use / the base", 1.02, [m for name, v in merged.items() for m in ratios(v, name)]),
        Bound("NoRA, in use / the base", 1.05, ratios("nora")),
        Bound("Not merged, in generation / the base", 1.10, unmerged),
    ]


def _whole_jobs() -> list[Bound]:
    of = {r["job"]: r for r in load(RESULTS / "whole_jobs.json")}
    ratios = {name: [m for job, r in of.items() for m in _ratio(job, [r["over_peer"]], name)] for name in WHOLE_JOB}
    return [Bound(quantity, limit, ratios[name]) for name, (quantity, limit) in WHOLE_JOB.items()]


def _beginning() -> list[Bound]:
    records = load(RESULTS / "startup.json")
    if not records:
        return []
    of = {r["what"]: r for r in records}
    methods = [r for r in of.values() if "attach" in r]
    slowest = max(methods, key=lambda r: r["attach"]["median"])
    longest = max(methods, key=lambda r: r["file_bytes"] - r["value_bytes"])
    rest = (longest["file_bytes"] - longest["value_bytes"]) / 1024
    return [
        Bound("Attaching to a LLaMA of 8B, seconds", 2.0, _ratio("slowest", [slowest], "attach")),
        Bound("`import lit_adapters` beyond torch, seconds", IMPORT_SECONDS, _ratio("", [of["import"]], "seconds")),
        Bound("An adapter file beyond its values, KiB", 64, [("largest", rest, f"{rest:.0f}")]),
    ]
