"""Configuration objects: plain forms, round trips, and refusals that name the value."""

import json

import pytest
from jsonargparse import ArgumentError, ArgumentParser

import lit_adapters as la
from lit_adapters.methods.method import to_methods
from tests.matrix import ALL


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_round_trip_through_json(method):
    config = json.loads(json.dumps(method.to_config()))
    (restored,) = to_methods(config)
    assert restored == method
    assert restored.to_config() == method.to_config()


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_round_trip_through_the_command_line_parser(method):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapters", type=la.Method | list[la.Method] | None)
    parsed = parser.parse_object({"adapters": method.to_config()})
    assert parser.instantiate(parsed).adapters == method
    several = parser.parse_object({"adapters": [method.to_config(), la.LoRA().to_config()]})
    assert parser.instantiate(several).adapters == [method, la.LoRA()]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_path": "lit_adapters.NoLRA"}, "NoLRA"),
        ({"class_path": "lit_adapters.NoRA", "init_args": {"grups": 4}}, "grups"),
        ({"class_path": "lit_adapters.NoRA", "init_args": {"groups": "many"}}, "many"),
        (
            {
                "class_path": "lit_adapters.NoRAPlusPlus",
                "init_args": {"nora": {"class_path": "lit_adapters.NoRA", "init_args": {"grups": 4}}},
            },
            "grups",
        ),
    ],
)
def test_the_command_line_parser_names_what_is_wrong(config, message):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapters", type=la.Method | list[la.Method] | None)
    with pytest.raises(ArgumentError, match=message):
        parser.parse_object({"adapters": config})


def test_forms_that_to_methods_takes():
    assert to_methods(None) == []
    assert to_methods(la.LoRA()) == [la.LoRA()]
    assert to_methods([la.LoRA(), {"class_path": "lit_adapters.NoRA"}]) == [la.LoRA(), la.NoRA()]
    assert to_methods({"class_path": "LoRA", "init_args": {"rank": 4}}) == [la.LoRA(rank=4)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lora", "not 'lora'"),
        (3, "not 3"),
        ([3], "needs 'class_path'"),
        ({"init_args": {}}, "needs 'class_path'"),
        ({"class_path": "lit_adapters.NoLRA"}, "no adapter method 'lit_adapters.NoLRA'"),
        ({"class_path": "nowhere.LoRA"}, "no adapter method 'nowhere.LoRA'"),
        ({"class_path": "..LoRA"}, r"no adapter method '\.\.LoRA'"),
        ({"class_path": ""}, "no adapter method ''"),
        ({"class_path": "lit_adapters.LoRA", "init_args": {"rank": 0}}, "rank 0 must be a whole number"),
        ({"class_path": "lit_adapters.NoRA", "init_args": {"groups": "8"}}, r"lit_adapters\.NoRA: "),
        ({"class_path": "torch.nn.Linear"}, "'torch.nn.Linear' is no adapter method"),
        ({"class_path": "lit_adapters.LoRA", "init_args": {"rnak": 3}}, "rnak"),
    ],
)
def test_what_is_no_method_is_refused(config, message):
    with pytest.raises(la.AdapterError, match=message):
        to_methods(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: la.LoRA(rank=0), "rank 0"),
        (lambda: la.LoRA(rank_pattern={"x": 0}), "rank 0"),
        (lambda: la.LoRA(dropout=1.0), r"dropout 1.0"),
        (lambda: la.NoRA(groups=0), "groups 0"),
        (lambda: la.NoRA(rank=0), "rank 0"),
        (lambda: la.NoRA(degrees=(9, 4)), r"degrees \(9, 4\)"),
        (lambda: la.NoRA(degrees=(5,)), r"degrees \(5,\)"),
        (lambda: la.NoRA(denominator="sum"), "denominator 'sum'"),
        (lambda: la.NoRA(base="fixed"), "base 'fixed'"),
        (lambda: la.NoRA(scaling="auto"), "scaling 'auto'"),
        (lambda: la.NoRA(fit_range=(3, -3)), "fit_range"),
        (lambda: la.NoRA(fit_range="auto"), "fit_range 'auto' must be an interval"),
        (lambda: la.NoRA(fit_range=(0.0, float("nan"))), "fit_range"),
        (lambda: la.NoRA(fit_range=(1.0,)), "fit_range"),
        (lambda: la.NoRA(channel_dim="last"), "channel_dim 'last'"),
        (lambda: la.NoRA(scale=0), "scale 0"),
        (lambda: la.NoRA(scale=float("nan")), "scale nan"),
        (lambda: la.NoRA(exclude="mlp.act"), r"exclude 'mlp.act' must be a list of name suffixes"),
        (lambda: la.NoRAPlusPlus(nora=la.LoRA()), "LoRA"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(la.AdapterError, match=message):
        make()
