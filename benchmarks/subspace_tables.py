"""The tables and the figure of docs/functional-subspace.md, from results/subspace.json and callback_overhead.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lit_adapters.learned.pictures import save_figure

Records = list[dict[str, Any]]
_NAMES = {"vit": "ViT-S/14", "smollm2": "SmolLM2-135M"}
_KEYS = ("effective_rank", "components_90", "components_99")


def _named(arm: str) -> str:
    model, _, rest = arm.partition(" ")
    return f"{_NAMES[model]}, {rest.removeprefix('nora ')}"


def dimension_rows(records: Records) -> list[list[str]]:
    """One row for what was learned, one for each random control: effective rank, directions for 90% and 99%."""
    rows = []
    for record in records:
        if "functional" not in record:
            continue
        f = record["functional"]
        name = _named(record["arm"])
        learned = f["learned"]
        values = [f"{learned['effective_rank']:.2f}", str(learned["components_90"]), str(learned["components_99"])]
        rows.append([name, str(f["functions"]), f"{f['drift']:.3f}", *values])
        for control in ("random", "random, rank 3"):
            if control in f:
                shown = [f"{f[control][key][0]:.2f} ± {f[control][key][1]:.2f}" for key in _KEYS]
                rows.append([control, "", "", *shown])
    return rows


def sinter_rows(records: Records) -> list[list[str]]:
    """One row a pair of constants: share of B A that Sinter adds, over layers, and its share in the logits' change."""
    rows = []
    for record in records:
        if "logits" in record:
            share = record["share"]
            mean = sum(share) / len(share)
            change = record["logits"]["sinter over update"]
            spread = f"{min(share):.1e}\N{EN DASH}{max(share):.1e}"
            row = [record["arm"].removeprefix("smollm2 loran "), f"{mean:.1e} ({spread})"]
            rows.append([*row, f"{change:.1e}"])
    return rows


def residual_rows(records: Records) -> list[list[str]]:
    """AFA's distance from linear by step, and over the beta that its batch ran with (of a linear schedule)."""
    rows = []
    for record in records:
        if " afa " not in record["arm"]:
            continue
        residual = record["series"]["adapter/summary/nonlinearity"]
        beta = record["series"]["adapter/summary/beta"]
        shown = []
        for step in ("2", "6", "10", "14", "16"):
            used = (beta[step] + beta[str(int(step) - 2)]) / 2  # records are two steps apart, the batch between them
            value = residual[step]
            shown.append(f"{value:.3f}" + (f" ({value / used:.2f})" if value > 0 else ""))
        loss = list(record["series"]["train/loss"].values())[-1]
        rows.append([record["arm"].split()[-1], *shown, f"{loss:.4f}"])
    return rows


def run_rows(records: Records) -> list[list[str]]:
    """The healthy and the sick run: how they ended, and the largest means on the way."""
    rows = []
    for r in records:
        drift = r["most"]["relative_drift"]
        slope = r["most"]["relative_max_slope"]
        rows.append(
            [
                r["arm"],
                f"{r['accuracy']:.3f} ± {r['stderr']:.3f} (n = {r['n']})",
                f"{r['train_loss']:.2f}",
                f"{min(r['drift']):.2f} to {max(r['drift']):.2f}",
                f"{drift['value']:.2f} (step {drift['step']})",
                f"{sum(r['slope']) / len(r['slope']):.1f}",
                f"{slope['value']:.1f} (step {slope['step']})",
                f"{r['outside']:.2%}",
            ]
        )
    return rows


def overhead_rows(records: Records) -> list[list[str]]:
    """The latest record of each model."""
    latest = {r["model"]: r for r in records}
    return [
        [
            _NAMES[model],
            f"{r['steps']} in {r['seconds']:.0f} s",
            f"{r['share']:.1%}",
            f"{r['start_seconds']:.1f}",
            f"{r['last_figures_seconds']:.1f}",
        ]
        for model, r in latest.items()
    ]


def _series(record: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    values = record["series"][name]
    return [int(step) for step in values], list(values.values())


def figure(records: Records, path: Path) -> None:
    """Energies of the learned directions; AFA's residual and Sinter's share over the steps."""
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    first, second, third = drawn.subplots(1, 3)
    styles = {"vit": "-", "smollm2": "--"}
    for record in records:
        model = record["arm"].split()[0]
        if "functional" in record:
            energy = record["functional"]["learned"]["energy"]
            colour = "tab:orange" if "direct" in record["arm"] else "tab:blue"
            shown = [max(e, 1e-7) for e in energy]
            first.plot(
                range(1, len(shown) + 1), shown, styles[model], color=colour, marker=".", label=_named(record["arm"])
            )
        elif " afa " in record["arm"]:
            second.plot(*_series(record, "adapter/summary/nonlinearity"), label=record["arm"].split()[-1])
            if "relu" in record["arm"]:
                second.plot(*_series(record, "adapter/summary/beta"), "k:", label="beta")
        elif " loran " in record["arm"]:
            third.plot(*_series(record, "adapter/summary/nonlinearity"), label=record["arm"].partition(" loran ")[2])
    first.set(
        yscale="log",
        ylim=(1e-4, 1.5),
        xlabel="direction",
        ylabel="share of the energy",
        title="NoRA: all learned changes",
    )
    second.set(
        xlabel="optimiser step",
        ylabel="||phi_beta(z) - z|| / ||z||",
        title="AFA-LoRA: what is nonlinear",
        ylim=(0, None),
    )
    third.set(yscale="log", xlabel="optimiser step", ylabel="||f(BA) - BA|| / ||BA||", title="LoRAN: what Sinter adds")
    third.axhline(2**-9, color="0.5", linestyle=":", label="rounding to bfloat16")
    for panel in (first, second, third):
        panel.legend(fontsize=8)
    save_figure(drawn, path, dpi=110)


def linearisation_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """What corrections of matrices take over of NoRA, in docs/from-peft.md."""
    rows = []
    for r in records:
        scale, digits = (100, 1) if r["metric"] == "test/acc1" else (1, 3)
        gain = r["adapted"] - r["replaced"]
        for entry in r["ranks"]:
            share = (entry["value"] - r["replaced"]) / gain if gain else 0.0
            worst = max(corrected for _, _, corrected in entry["layers"])
            rows.append(
                [
                    f"{r['arm']}, rank {entry['rank']}",
                    f"{scale * r['adapted']:.{digits}f}",
                    f"{scale * r['replaced']:.{digits}f}",
                    f"{scale * entry['value']:.{digits}f}",
                    f"{share:.0%}",
                    f"{entry['outputs'][0]:.1%} to {entry['outputs'][1]:.1%}",
                    f"{worst:.1%}",
                ]
            )
    return rows
