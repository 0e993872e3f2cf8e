"""Try every method on one small member of each model family.

Writes results/breadth.json, results/breadth.md with every model, and the summary docs/breadth.md.

python -m benchmarks.breadth
"""

from __future__ import annotations

import copy
import functools
import json
import re
import textwrap
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

import lit_adapters as la
from benchmarks.results_file import RESULTS, environment
from lit_adapters.files.atomic import write_atomically
from tests.families import FAMILIES, Family

PAGE = Path(__file__).parents[1] / "docs" / "breadth.md"
MODELS_PAGE = RESULTS / "breadth.md"
METHODS: dict[str, Callable[[Family], la.Method]] = {
    "NoRA": lambda f: la.NoRA(groups=f.groups, base="anchored", targets=f.activations, channel_dim=f.channel_dim),
    "GroupAffine": lambda f: la.GroupAffine(groups=f.groups, targets=f.activations, channel_dim=f.channel_dim),
    "LoRA": lambda f: la.LoRA(rank=2, alpha=4.0, targets=f.linear),
    "VeRA": lambda f: la.VeRA(rank=2, targets=f.linear),
    "NestedLoRA": lambda f: la.NestedLoRA(rank=2, inner_rank=1, alpha=4.0, init="svd", targets=f.linear),
    "LoRA2": lambda f: la.LoRA2(width=2, rank=2, alpha=400.0, targets=f.linear),
    "AFALoRA": lambda f: la.AFALoRA(rank=2, alpha=4.0, activation="silu", targets=f.linear),
    "DenseLoRA": lambda f: la.DenseLoRA(rank=2, alpha=4.0, dropout=0.0, targets=f.linear),
    "LoRAN": lambda f: la.LoRAN(rank=2, alpha=4.0, function="sinter", targets=f.linear),
}
ON_ACTIVATIONS = ("NoRA", "GroupAffine")
ON_WEIGHTS = tuple(method for method in METHODS if method not in ON_ACTIVATIONS)
_INTRODUCTION = """\
# Which models work

Each method was tried on one small model of each family, built from its configuration with random weights. "Works"
means: attaching leaves the function unchanged bit for bit (GroupAffine: to 1e-6), `lit_adapters.verify` passes, and one
forward and backward pass in training mode gives every adapter a gradient. By default NoRA and GroupAffine have
`targets="activations"`, and LoRA, VeRA, NestedLoRA, LoRA2, AFALoRA, DenseLoRA and LoRAN have `targets="all-linear"`.

[Every model](../benchmarks/results/breadth.md) has its name and number of adapters in a table of its own;
`benchmarks/results/breadth.json` has the full error messages. `python -m benchmarks.breadth` writes all three files.
"""
_MODELS_INTRODUCTION = """\
# Every model that was tried

`python -m benchmarks.breadth` writes this page. A number counts the adapters. "no (r1)" is an `AdapterError`; the
reasons r1, r2, ... stand at the end. The last column names targets that are not the default ones.
"""


@functools.lru_cache(maxsize=1)
def _prototype(key: str) -> nn.Module:
    """The model, with every weight off its initialisation, where zeros would hide an adapter from the loss."""
    torch.manual_seed(0)
    network = FAMILIES[key].make()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # stochastic depth: a dropped block gives its adapters no gradient
    return network.eval()


def check(key: str, method: str) -> int:
    """Attach a method to a fresh copy of a family's model, take one step of gradients; the number of adapters.

    Raises:
        AdapterError: The library refuses the method for this model.
        AssertionError: The library accepts it, but an adapter takes no part, or the start is not the model's
            function.
    """
    family, network = FAMILIES[key], copy.deepcopy(_prototype(key))
    torch.manual_seed(0)
    # PyTorch computes some products of a parameter in another order if the parameter requires gradients, and some
    # processors round the two differently (ConViT). `attach` freezes; so the base is frozen for the comparison too.
    required_grad = {parameter: parameter.requires_grad for parameter in network.parameters()}
    network.requires_grad_(False)
    with torch.no_grad():
        expected = family.run(network)
        for parameter, before in required_grad.items():
            parameter.requires_grad_(before)
        report = la.attach(network, METHODS[method](family), train=family.train)
        got = family.run(network)
    # GroupAffine hands the activation a contiguous input, and PyTorch rounds some activations of views otherwise.
    tolerance = 1e-6 if method == "GroupAffine" else 0.0
    assert torch.allclose(got, expected, rtol=0, atol=tolerance), "the start is not the function of the model"
    la.verify(network, **family.inputs)

    adapters = dict(la.adapters(network))
    assert len(adapters) == len(report.adapters) > 0, "no adapter"
    own = {f"{n}.{k}": p for n, a in adapters.items() for k, p in a.adapter_parameters().items()}
    with torch.no_grad():
        for parameter in own.values():  # off the start, where half of the factors have no gradient yet
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits = family.run(network.train()).flatten(0, -2)
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])
    assert loss.isfinite(), f"the loss is {loss}"
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in own.items()}
    broken = [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    assert not broken, f"no finite gradient: {broken}"
    awake = {name.rpartition(".")[0] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert awake == adapters.keys(), f"a gradient of zero: {sorted(adapters.keys() - awake)}"
    return len(adapters)


def outcome(key: str, method: str) -> dict[str, Any]:
    """What `check` finds: {"adapters": n}, {"refused": message} or {"fails": message}."""
    try:
        return {"adapters": check(key, method)}
    except la.AdapterError as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever a model does: the table is to say so
        return {"fails": f"{type(error).__name__}: {error}"}


def reason(found: dict[str, Any]) -> str | None:
    """Why an outcome is none, in a few words: the first clause of the message; None where the method works."""
    if "adapters" in found:
        return None
    if "fails" in found:
        return f"**fails**: {found['fails'].partition('. ')[0]}"
    message = re.sub(rf"^({'|'.join(METHODS)}): ", "", found["refused"])
    return re.split(r"[.;:] | [(]", message)[0]


def page(record: dict[str, Any]) -> str:
    """docs/breadth.md: what works with the default targets, what needs targets by name, what is refused."""
    lines = [_INTRODUCTION, _versions(record)]
    for library in ("timm", "transformers"):
        rows = [row for row in record["families"] if row["library"] == library]
        plain = [_family(row) for row in rows if not _targets(row) and not _refusals(row)]
        works = f"All nine methods work with their default targets: {', '.join(plain)}."
        lines += [f"\n## {library}\n", textwrap.fill(works, 120, break_on_hyphens=False)]
        if named := [f"| {_family(row)} | {_targets(row)} |" for row in rows if _targets(row)]:
            lines += ["\nTargets were named for:\n", "| family | targets |", "|---|---|", *named]
        families: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            for refusal in _refusals(row):
                families.setdefault(refusal, []).append(_family(row))
        lines += [
            "\nDoes not work (an `AdapterError`, unless it says **fails**):\n",
            "| method | family | reason |",
            "|---|---|---|",
        ]
        lines += [f"| {methods} | {', '.join(of)} | {why} |" for (methods, why), of in families.items()]
    return "\n".join(lines) + "\n"


def _versions(record: dict[str, Any]) -> str:
    e = record["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("lit-adapters", "torch", "timm", "transformers"))
    return f"{versions}, {e['date']}."


def _family(row: dict[str, Any]) -> str:
    """The name of a family, what is special about its model in brackets."""
    name, _, special = row["name"].partition(", ")
    return f"{name} ({special})" if special else name


def _refusals(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The methods that a reason excludes, and the reason without the name of one layer or model."""
    methods: dict[str, list[str]] = {}
    for method in METHODS:
        if text := reason(row[method]):
            methods.setdefault(re.sub(r" of ('[\w.]+'|[A-Z]\w+$)", "", text), []).append(method)
    every = {ON_WEIGHTS: "all methods on weights", ON_ACTIVATIONS: "all methods on activations"}
    return [(every.get(tuple(excluded), ", ".join(excluded)), text) for text, excluded in methods.items()]


def models_page(record: dict[str, Any]) -> str:
    """benchmarks/results/breadth.md: every model with its number of adapters, or the reason that there are none."""
    found = [reason(row[method]) for row in record["families"] for method in METHODS]
    reasons = {text: f"r{i}" for i, text in enumerate(dict.fromkeys(filter(None, found)), 1)}

    def cell(row: dict[str, Any], *methods: str) -> str:
        texts = {m: str(row[m].get("adapters") or f"no ({reasons[str(reason(row[m]))]})") for m in methods}
        common = max(texts.values(), key=list(texts.values()).count)
        return "; ".join([common, *(f"{m}: {text}" for m, text in texts.items() if text != common)])

    lines = [_MODELS_INTRODUCTION, _versions(record)]
    for library in ("timm", "transformers"):
        lines += [
            f"\n## {library}\n",
            f"| family | model | {', '.join(ON_ACTIVATIONS)} | {', '.join(ON_WEIGHTS)} | targets |",
            "|---" * 5 + "|",
        ]
        for row in record["families"]:
            if row["library"] == library:
                cells = [row["name"], f"`{row['model']}`", cell(row, *ON_ACTIVATIONS), cell(row, *ON_WEIGHTS)]
                lines.append(f"| {' | '.join([*cells, _targets(row)])} |")
    lines += ["\n## Reasons\n", *(f"- {name}: {text}" for text, name in reasons.items())]
    return "\n".join(lines) + "\n"


def _targets(row: dict[str, Any]) -> str:
    """The targets that are not the default ones."""
    told = []
    for kind, default in (("linear", "all-linear"), ("activations", "activations")):
        given = row[kind]
        if given != default:
            names = ", ".join(f"`{name}`" for name in ([given] if isinstance(given, str) else given))
            told.append(f"{kind}: {names}")
    return "; ".join(told)


def _save(path: Path, text: str) -> None:
    def fill(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, fill)


def main() -> None:
    """Try everything and write the three files."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    for key, family in tqdm(FAMILIES.items(), desc="families"):
        row = {name: getattr(family, name) for name in ("name", "library", "model", "linear", "activations")}
        rows.append(row | {method: outcome(key, method) for method in METHODS})
    record = {"environment": environment() | {"transformers": version("transformers")}, "families": rows}
    _save(RESULTS / "breadth.json", json.dumps(record, indent=1) + "\n")
    _save(PAGE, page(record))
    _save(MODELS_PAGE, models_page(record))


if __name__ == "__main__":
    main()
