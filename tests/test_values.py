"""Every setting of every method and schedule, given strange values: they are refused by name, or they work."""

import dataclasses

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters import methods, schedules
from lit_adapters.methods.method import Method
from lit_adapters.schedules import Schedule
from tests.mutations import STRANGE

CLASSES = [
    kind
    for module, parent in ((methods, Method), (schedules, Schedule))
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, parent) and dataclasses.is_dataclass(kind)
    if kind not in (la.Peft, schedules.Ramp)
]
NUMBERS = {"rank": 8, "alpha": 1.0, "groups": 1, "window": 50, "steps": 4, "seed": 0, "channel_dim": 1}
NO_NUMBERS = [None, True, False, "8", "", [8], {}, float("nan"), float("inf"), -float("inf"), 2.5, 1 + 0j]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_strange_values_are_refused_by_name_or_harmless(kind):
    tried = longest = 0
    for field in dataclasses.fields(kind):
        for value in [
            *STRANGE,
            [float("nan"), 1.0],
            (0, 1e30),
            (1e30, 1e31),
            ("a", "b"),
            {"(": 3},
            {3: 3},
            b"x",
            {1, 2},
        ]:
            tried += 1
            try:
                made = kind(**{field.name: value})
            except la.AdapterError as error:
                longest = max(longest, len(str(error)))
                continue
            assert made.to_config() == kind(**made.to_config()["init_args"]).to_config()
    assert tried > 25
    assert 0 < longest < 600


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_whole_numbers_are_nothing_else(kind):
    for field in dataclasses.fields(kind):
        whole = field.name in ("rank", "groups", "window", "steps", "seed", "channel_dim")
        for value in NO_NUMBERS if whole else ():
            if value is None and (kind, field.name) == (la.NoRA, "rank"):
                continue  # trains the coefficients directly
            with pytest.raises(la.AdapterError, match=f"(?i){field.name} "):
                kind(**{field.name: value})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (la.NoRA, {"rank": 1_000_000}),
        (la.NoRA, {"groups": 10**9}),
        (la.NoRA, {"alpha": 0}),
        (la.NoRA, {"alpha": "6"}),
        (la.NoRA, {"alpha": float("nan")}),
        (la.NoRA, {"fit_range": (-1e30, 1e30)}),
        (la.NoRA, {"fit_range": (0.0, 1e-9)}),
        (la.NoRA, {"fit_range": (False, True)}),
        (la.NoRA, {"degrees": (5.5, 4)}),
        (la.NoRA, {"channel_dim": True}),
        (la.NoRA, {"channel_dim": 10**30}),
        (la.NoRA, {"scale": float("inf")}),
        (la.LoRA, {"alpha": 1e300}),
        (la.LoRA, {"rslora": None}),
        (la.LoRA, {"targets": [["q"]]}),
        (la.LoRA, {"targets": {"q": 1}}),
        (la.LoRA, {"exclude": None}),
        (la.LoRA, {"rank_pattern": []}),
        (la.LoRA, {"rank_pattern": {"(": 3}}),
        (la.LoRAN, {"amplitude": float("inf")}),
        (la.LoRAN, {"function": ["tanh"]}),
        (la.AFALoRA, {"groups": 0.5}),
        (la.VeRA, {"rank": 10**9}),
        (schedules.Linear, {"end": "0.3"}),
        (schedules.Polynomial, {"power": 1e30}),
        (schedules.Step, {"steps": 0}),
        (schedules.Hold, {"value": True}),
        (schedules.Adaptive, {"monitor": 3}),
    ],
)
def test_values_that_nobody_means(kind, settings):
    (name,) = settings
    with pytest.raises(la.AdapterError, match=name):
        kind(**settings)


def test_a_dimension_that_the_input_lacks_is_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    la.attach(model, la.NoRA(groups=4, channel_dim=3))
    with pytest.raises(la.AdapterError, match=r"'1' has the shape \(2, 8\), without a dimension 3"):
        model(torch.zeros(2, 4))
