"""A training that ends before annealing does says so: on saving, and when the process ends."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters.model import unfinished
from lit_adapters.training.annealing import Annealer

X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.fixture(autouse=True)
def _no_other_training(monkeypatch):
    monkeypatch.setattr(unfinished, "_begun", set())


def trained(steps, total, method=None, move=True):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.attach(model, method or la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.8)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        if move:
            la.set_progress(model, (step + 1) / total)
    return model


def at_exit():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unfinished._at_exit()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("steps", "move"), [(3, True), (3, False)])
def test_the_process_end_tells_of_a_training_that_stopped_early(kept, steps, move):
    model = trained(steps, 8, move=move)
    if not kept:
        del model
    (message,) = at_exit()
    assert f"1 trained models are still nonlinear ('0' at progress {0.375 if move else 0} of Linear" in message
    assert "set_progress(model, step / steps) up to 1" in message


@pytest.mark.parametrize("kept", [True, False])
def test_it_is_silent_where_what_is_linear_trains_on(tmp_path, kept):
    la.save_adapters(trained(7, 8), tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    la.load_adapters(model, tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    if not kept:
        del model, optimizer
    assert at_exit() == []


@pytest.mark.parametrize("kept", [True, False])
def test_it_is_silent_after_the_end_of_annealing(kept):
    model = trained(7, 8)
    if not kept:
        del model
    assert at_exit() == []


@pytest.mark.parametrize("end", [la.detach, lambda m: m[0].set_beta(0.0), Annealer])
def test_it_is_silent_where_the_end_is_chosen_or_told_by_others(end):
    model = trained(3, 8)
    end(model)
    assert at_exit() == []


def test_nothing_is_said_of_models_that_were_not_trained_or_never_end(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    la.attach(model, la.AFALoRA(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.save_adapters(model, tmp_path)
        la.save_adapters(trained(3, 8, la.AFALoRA(rank=2, schedule=la.schedules.Hold())), tmp_path)
        la.save_adapters(trained(3, 8, la.LoRA(rank=2)), tmp_path)
        la.save_adapters(trained(7, 8), tmp_path)
    assert at_exit() == []


def test_saving_warns_once(tmp_path):
    model = trained(4, 8)
    with pytest.warns(UserWarning, match=r"holds 2 adapters that are still nonlinear \(beta 0.375, '0' first\)"):
        la.save_adapters(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.save_adapters(model, tmp_path)
    with pytest.raises(la.AdapterError, match=r"nonlinear at beta = 0\.375"):
        la.merge(model)


@pytest.mark.slow
def test_a_process_of_its_own():
    code = """if True:
        import torch, lit_adapters as la
        def main():
            model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            la.attach(model, la.AFALoRA(rank=2))
            la.set_progress(model, 0.1)
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the process ends, and 1 trained models are still nonlinear ('0' at progress 0.1" in done.stderr
