"""`lit-adapters estimate`: what a recipe takes in memory and time, before anything is loaded or trained."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_adapters import console
from lit_adapters.errors import AdapterError

if TYPE_CHECKING:
    from lit_adapters.training.hardware import Device

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE", help="the recipe of a training")
    parser.add_argument(
        "--program", metavar="MODULE", help="whose recipe it is: vision, language, or a module of yours with `main`"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of it, such as data.batch_size=16")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many share the work; default 1")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="how they share it; default ddp")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="a GPU by name, or cpu: this machine, measured")
    parser.add_argument("--device-memory", metavar="80GiB", help="memory of a device, instead of its own")
    parser.add_argument("--flops", metavar="362T", help="operations a second in the recipe's precision")
    parser.add_argument("--bandwidth", metavar="864GB", help="bytes of memory read and written in a second")
    parser.add_argument("--link", metavar="32GB", help="bytes sent to other devices in a second")


def estimate(args: argparse.Namespace) -> None:
    """`estimate`: say what a step of a recipe takes, and what to change where it does not fit."""
    # Lightning takes seconds to import, and most commands do without.
    from lit_adapters.lightning.recipe_cost import read_recipe
    from lit_adapters.training.placement import place
    from lit_adapters.training.step_cost import OF_ROWS

    if args.devices < 1:
        raise AdapterError(f"--devices {args.devices} must be at least 1")
    recipe = read_recipe(args.config, args.settings, args.program)
    device = _device(args)
    cost, example = recipe.cost(), recipe.example
    placed = place(cost, args.devices, args.strategy)
    rows = [("memory of a device at the peak of a step", "MiB")]
    rows += [(part, f"{size / 2**20:,.1f}") for part, size in placed.parts.items() if size >= 0.05 * 2**20]
    rows.append(("in all", f"{placed.peak / 2**20:,.1f}"))
    print(console.text_table(rows, right=(1,)))
    batches = recipe.accumulated
    sending = placed.seconds_between(device)
    arithmetic, memory = (seconds * batches for seconds in device.bounds(cost.operations))
    seconds = device.seconds(cost.operations) * batches + sending
    items = example.items * batches * args.devices
    print(
        f"a step of {items:,} {example.unit}: {cost.flops * batches / 1e9:,.1f} GFLOP and "
        f"{cost.moved * batches / 1e9:,.2f} GB moved on each device"
    )
    parts = f"arithmetic alone {_seconds(arithmetic)}, memory alone {_seconds(memory)}"
    if args.devices > 1:
        parts += f", sending {_seconds(sending)}"
    print(
        f"time on {device.name}: at least {_seconds(seconds)} a step, {items / seconds:,.0f} {example.unit} a second "
        f"({parts})"
    )
    fixed = placed.peak - sum(placed.parts.get(part, 0) for part in OF_ROWS)
    most = int((device.memory - fixed) // (cost.of_rows / example.rows))
    size = f"{device.memory / 2**30:,.1f} GiB"
    if placed.peak <= device.memory:
        print(f"fits {size}: yes, up to about {max(most, example.rows):,} rows in a batch (here {example.rows})")
        return
    print(f"fits {size}: no" + (f"; a batch of {most} rows would" if most > 0 else "") + ". Of single changes,")
    for setting in recipe.module.memory_savers:
        changed = read_recipe(args.config, [*args.settings, setting], args.program).cost()
        print(f"  {setting}: {_fitting(place(changed, args.devices, args.strategy).peak, device)}")
    others = max(2, args.devices)
    if args.strategy == "ddp":
        print(f"  --strategy fsdp --devices {others}: {_fitting(place(cost, others, 'fsdp').peak, device)}")


def _fitting(peak: float, device: Device) -> str:
    return f"{peak / 2**30:,.1f} GiB a device{', which fits' if peak <= device.memory else ''}"


def _device(args: argparse.Namespace) -> Device:
    from lit_adapters.training.hardware import DEVICES, this_machine

    if args.device == "cpu":
        return _changed(this_machine(), args)
    if args.device not in DEVICES:
        raise AdapterError(f"--device {args.device!r} is unknown: use cpu, {', '.join(DEVICES)}, with changes")
    return _changed(DEVICES[args.device], args)


def _changed(device: Device, args: argparse.Namespace) -> Device:
    """The device with what the options say of it."""
    changes: dict[str, Any] = {}
    for option, fields in (
        ("device_memory", ("memory",)),
        ("flops", ("halves", "floats")),
        ("bandwidth", ("bandwidth",)),
        ("link", ("link",)),
    ):
        if (text := getattr(args, option)) is not None:
            changes |= dict.fromkeys(fields, _number(f"--{option.replace('_', '-')}", text))
    return replace(device, **changes)


def _number(option: str, text: str) -> float:
    """80GiB, 864GB, 362T or 3.2e12 as a number.

    Raises:
        AdapterError: It is none of these, or not above 0.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(|[KMGTP]|[KMGT]i)(?:B|B/s|FLOPS)?", text.strip())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise AdapterError(f"{option} {text!r} is no number above 0 with a unit, such as 80GiB, 864GB or 362T")
    return value


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds:.3f} s"
