"""Settings of all tests."""

import atexit
import logging
import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, if it is imported after this

import lightning.pytorch  # noqa: F401 - sets its logger up

from lit_adapters.cli.commands import main
from lit_adapters.model import unfinished

# Tests train models for a step or two, and the end of their process has nothing to tell of them.
atexit.unregister(unfinished._at_exit)

# Lightning keeps its messages to itself if nothing else has set logging up before it, and tests read them.
logging.getLogger("lightning.pytorch").propagate = True

# The networks are tiny: a second thread costs more than it brings, much more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command of `lit-adapters` in this process; what it printed."""

    def command(*args: object) -> str:
        main([str(a) for a in args])
        return capsys.readouterr().out

    return command
