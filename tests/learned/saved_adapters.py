"""Adapter directories and checkpoints of tiny models, as the command line meets them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lit_adapters as la
from lit_adapters.cli.commands import main
from tests.lightning.tiny_task import Net, Task, fit
from tests.matrix import move

NET = "tests.lightning.tiny_task.Net"


def refuses(*args: object) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    assert isinstance(end.value.code, str), "ended well"  # a string goes to stderr, with status 1
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


def adapted_net(*methods: la.Method, train: Any = ("head",), seed: int = 0) -> Net:
    """`Net` with all that trains moved off its start, and nothing nonlinear left to anneal."""
    torch.manual_seed(seed)
    net = Net()
    la.attach(net, methods, train=train)
    move(net, seed)
    la.set_progress(net, 1.0)
    return net.eval()


def saved_net(folder: Path, *methods: la.Method, **changes: Any) -> Net:
    """The same, with its directory written."""
    net = adapted_net(*methods, **changes)
    la.save_adapters(net, folder)
    return net


def checkpoint(folder: Path, task: Task | None = None) -> tuple[Task, Path]:
    """A fitted task and its checkpoint, as `AdapterCallback` leaves it."""
    task = task or Task()
    fit(folder, task, la.AdapterCallback(), ModelCheckpoint(folder, filename="last"))
    return task, folder / "last.ckpt"


def rows(printed: str) -> dict[str, dict[str, str]]:
    """The lines of a printed table by their first column; cells by the heading above them."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    heading, found = lines[first], {}
    # The columns of numbers end below the end of their heading, the others begin below its beginning.
    for line in lines[first + 1 : lines.index("", first)]:
        cells = [cell for cell in line.split("  ") if cell]
        found[cells[0].strip()] = dict(zip(_words(heading), (c.strip() for c in cells), strict=False))
    return found


def _words(heading: str) -> list[str]:
    return [word.strip() for word in heading.split("  ") if word.strip()]


def rational(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum a_i x^i / (1 + |sum b_j x^j|), in float64, straight from the formula; a (G, m+1), b (G, n) -> (G, D)."""
    x, a, b = x.double(), a.detach().double(), b.detach().double()
    p = sum(a[:, i, None] * x**i for i in range(a.shape[1]))
    q = sum(b[:, j, None] * x ** (j + 1) for j in range(b.shape[1]))
    return p / (1 + torch.as_tensor(q).abs())


def change_of(adapter: Any, x: Tensor) -> Tensor:
    """R - R0 of every group (G, D)."""
    return rational(x, *adapter.coefficients()) - rational(x, *adapter.base_coefficients())


def ranks(values: Tensor) -> tuple[float, float]:
    """Stable and effective rank of singular values, straight from their definitions."""
    share = values.double().square() / values.double().square().sum()
    share = share[share > 0]
    return (1 / share.max()).item(), torch.exp(-(share * share.log()).sum()).item()


class Deep(nn.Module):
    """A module of many linear layers and activations; never run."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 4), "fc": nn.Linear(8, 16)}) for _ in range(blocks)
        )
