"""Random states survive a checkpoint that is read without pickled code."""

import random

import numpy as np
import pytest
import torch

from lit_adapters.lightning.resume.random_state import random_states, set_random_states

CPU = torch.device("cpu")


def draws():
    # An odd number of normals: both generators keep the second one of a pair.
    values = [random.gauss(0, 1), random.random(), float(np.random.normal()), int(np.random.randint(100))]
    return values, torch.randn(3)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_round_trip(tmp_path, before):
    for _ in range(before):
        draws()
    torch.save(random_states(CPU), tmp_path / "states")
    values, tensor = draws()
    draws()
    set_random_states(torch.load(tmp_path / "states", weights_only=True), CPU)
    again, tensor_again = draws()
    assert again == values
    assert torch.equal(tensor, tensor_again)
