"""`lit-adapters estimate`: what a recipe takes in memory and time, before anything is loaded or trained."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_adapters import console
from lit_adapters.cli.models import look_here_for
from lit_adapters.errors import AdapterError

if TYPE_CHECKING:
    from lit_adapters.lightning.recipe_cost import Recipe
    from lit_adapters.training.hardware import Device
    from lit_adapters.training.step_cost import StepCost

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE", help="the recipe of a training")
    parser.add_argument(
        "--program", metavar="MODULE", help="whose recipe it is: vision, language, or a module of yours with `main`"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes of it, all together, such as data.batch_size=16 data.max_length=256",
    )
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
    from lit_adapters.lightning.recipe_cost import program_of, read_recipe
    from lit_adapters.training.placement import Placement, place

    if args.devices < 1:
        raise AdapterError(f"--devices {args.devices} must be at least 1")
    _check_settings(args.settings)
    program = args.program or program_of(args.config)
    look_here_for(program)

    def cost_of(*changes: str) -> StepCost:
        changed = read_recipe(args.config, [*args.settings, *changes], program)
        return changed.cost(foreach=args.device != "cpu")

    def placed_on(cost: StepCost, devices: int, strategy: Any) -> Placement:
        return place(cost, devices, strategy, recipe.accumulated)

    def peak_of(*changes: str) -> float:
        return placed_on(cost_of(*changes), args.devices, args.strategy).peak

    recipe = read_recipe(args.config, args.settings, program)
    if args.strategy == "fsdp" and args.devices > 1 and (obstacle := _obstacle_to_sharding(recipe)):
        raise AdapterError(obstacle)
    device, cost = _device(args), cost_of()
    placed = placed_on(cost, args.devices, args.strategy)
    rows = [(f"memory of a device at the peak of a step of {program}", "MiB")]
    rows += [(part, f"{size / 2**20:,.1f}") for part, size in placed.parts.items() if size >= 0.05 * 2**20]
    rows.append(("in all", f"{placed.peak / 2**20:,.1f}"))
    print(console.text_table(rows, right=(1,)))
    _print_time(recipe, cost, placed.seconds_between(device), device, args.devices)
    given = recipe.example.rows
    most = _most_rows(lambda count: peak_of(f"data.batch_size={count}"), given, placed.peak, device.memory)
    if placed.peak <= device.memory:
        print(f"fits {_size(device.memory)}: yes, with at least {most:,} rows in a batch (here {given:,})")
        return
    print(
        f"fits {_size(device.memory)}: no" + (f"; a batch of {most:,} rows does" if most else "") + ". Single changes:"
    )
    changes = {setting: peak_of(setting) for setting in getattr(recipe.module, "memory_savers", ())}
    if not _obstacle_to_sharding(recipe):
        more = 2 if args.strategy == "ddp" and args.devices == 1 else args.devices * (1 + (args.strategy == "fsdp"))
        changes[f"--strategy fsdp --devices {more}"] = placed_on(cost, more, "fsdp").peak
    for change, peak in changes.items():
        if peak < placed.peak:
            print(f"  {change}: {_size(peak)} a device{', which fits' if peak <= device.memory else ''}")


def _print_time(recipe: Recipe, cost: StepCost, sending: float, device: Device, devices: int) -> None:
    batches, unit = recipe.accumulated, recipe.example.unit
    items = recipe.example.items * batches * devices
    print(
        f"a step of {items:,} {unit}: {cost.flops(batches) / 1e9:,.1f} GFLOP and {cost.moved(batches) / 1e9:,.2f} GB "
        "moved on each device"
    )
    operations = [*cost.operations * batches, *cost.update]
    parts = " and ".join(_seconds(seconds) for seconds in device.bounds(operations))
    computing = device.seconds(operations)
    # A bound as long as nothing is measured: devices may send while they compute.
    seconds = computing + sending if device.measured else max(computing, sending)
    least, most = ("about", "about") if device.measured else ("at least", "at most")
    print(
        f"time on {device.name}: {least} {_seconds(seconds)} a step, {most} {items / seconds:,.0f} {unit} a second "
        f"(arithmetic and memory alone {parts}{f', sending {_seconds(sending)}' if devices > 1 else ''})"
    )


def _most_rows(peak_of: Callable[[int], float], rows: int, peak: float, memory: float) -> int:
    """The largest batch that was found to fit; 0 if none was. Each is traced; a line through two says which is next."""
    known = {rows: peak}
    count = 2 * rows if peak <= memory else max(1, rows // 2)
    while count not in known and len(known) < 5:
        known[count] = peak_of(count)
        (low, low_peak), (high, high_peak) = sorted(sorted(known.items(), key=lambda k: abs(k[1] - memory))[:2])
        slope = (high_peak - low_peak) / (high - low)
        count = max(1, high + int((memory - high_peak) // slope)) if slope > 0 else 2 * high
    return max((count for count, needed in known.items() if needed <= memory), default=0)


def _check_settings(settings: Sequence[str]) -> None:
    for setting in settings:
        key, given, _ = setting.partition("=")
        if not given or key.startswith("-"):
            raise AdapterError(f"setting {setting!r} must be KEY=VALUE, such as data.batch_size=16")
        if key.startswith(("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator")):
            raise AdapterError(f"setting {setting!r} does not count here: --devices, --strategy and --device say it")


def _obstacle_to_sharding(recipe: Recipe) -> str:
    """Why FSDP2 cannot share the recipe's model, with what to do instead; empty if it can."""
    import torch

    from lit_adapters.model.attach import adapters
    from lit_adapters.model.sharding import check_shardable

    if recipe.example.packed:
        return "4-bit weights cannot be shared by FSDP2: use --strategy ddp"
    try:
        with torch.device("meta"):
            model = recipe.example.build()
            check_shardable(model)
            optimizer = recipe.optimizer(model)
    except AdapterError as error:
        return str(error)
    parts = [recipe.module, optimizer, *(adapter for _, adapter in adapters(model))]
    return next(filter(None, (getattr(part, "needs_whole", "") for part in parts)), "")


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _device(args: argparse.Namespace) -> Device:
    """The device with what the options say of it."""
    from lit_adapters.training.hardware import DEVICES, this_machine

    changes: dict[str, Any] = {}
    for option, fields in (
        ("device_memory", ("memory",)),
        ("flops", ("halves", "floats")),
        ("bandwidth", ("bandwidth",)),
        ("link", ("link",)),
    ):
        if (text := getattr(args, option)) is not None:
            changes |= dict.fromkeys(fields, _number(f"--{option.replace('_', '-')}", text))
    if args.device != "cpu" and args.device not in DEVICES:
        raise AdapterError(f"--device {args.device!r} is unknown: use cpu, {', '.join(DEVICES)}, with changes")
    return replace(this_machine() if args.device == "cpu" else DEVICES[args.device], **changes)


def _number(option: str, text: str) -> float:
    """80GiB, 864GB, 362T or 3.2e12 as a number.

    Raises:
        AdapterError: The text is not a number, or the number is not above 0.
    """
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(|[KMGTP]|[KMGT]i)(?:B|B/s|FLOPS)?", text.strip())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise AdapterError(f"{option} {text!r} must be a number above 0, such as 80GiB, 864GB or 362T")
    return value


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds:.3f} s"
