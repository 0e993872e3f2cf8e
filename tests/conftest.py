"""Settings of all tests."""

import pytest
import torch

# The networks are tiny: a second thread costs more than it brings, much more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever ran before."""
    torch.manual_seed(0)
