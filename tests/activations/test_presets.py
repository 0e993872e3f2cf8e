"""The table of fits, the recognition of activation modules, and `fit_for`."""

import pytest
import timm.layers.create_act as timm_act
import torch
import torch.nn.functional as F
from timm.models.metaformer import SquaredReLU
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN, GELUActivation, ReLUSquaredActivation, XIELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

from lit_adapters.activations.fitting import fit_rational
from lit_adapters.activations.presets import PRESETS, activation_name, fit_for, is_known_activation
from lit_adapters.errors import AdapterError
from lit_adapters.ops.rational import rational

FORMS = ("abs-of-sum", "sum-of-abs")
FUNCTIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "quick_gelu": ACT2FN["quick_gelu"],
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "relu_squared": ACT2FN["relu2"],
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


def grid(low: float, high: float, points: int = 8001) -> torch.Tensor:
    return torch.linspace(low, high, points, dtype=torch.float64)


# ---- presets


def test_presets_cover_every_function_in_both_forms():
    assert set(PRESETS) == {(name, form) for name in FUNCTIONS for form in FORMS}
    assert all(fit.form == form for (_, form), fit in PRESETS.items())


@pytest.mark.parametrize(("name", "form"), PRESETS)
def test_preset_has_its_stated_error_in_the_form_that_runs(name, form):
    fit = PRESETS[name, form]
    x = grid(*fit.interval)
    a, b = (torch.tensor([c], dtype=torch.float64) for c in (fit.numerator, fit.denominator))
    error = (rational(x[:, None], a, b, fit.form)[:, 0] - FUNCTIONS[name](x)).abs().max().item()
    assert error == pytest.approx(fit.max_error, rel=0.01)


@pytest.mark.parametrize(("name", "form"), PRESETS)
def test_preset_is_what_a_fit_gives(name, form):
    fit, again = PRESETS[name, form], fit_rational(FUNCTIONS[name], denominator=form)
    x = grid(*fit.interval, 2001)
    torch.testing.assert_close(fit(x), again(x), rtol=0, atol=1e-6)


# ---- recognition

TRANSFORMERS_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
TIMM_NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "hard_swish": "hardswish",
    "hardswish": "hardswish",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
RECOGNISED = [
    *((ACT2FN[name], TRANSFORMERS_NAMES.get(name)) for name in ACT2CLS if name != "xielu"),
    *((cls(), TIMM_NAMES.get(name)) for name, cls in timm_act._ACT_LAYER_DEFAULT.items() if name != "identity"),
    *((cls(), TIMM_NAMES.get(name)) for name, cls in timm_act._ACT_LAYER_ME.items()),
    (timm_act.Swish(), "silu"),
    (timm_act.SwishMe(), "silu"),
    (timm_act.Mish(), "mish"),
    (timm_act.MishMe(), "mish"),
    (timm_act.HardSwish(), "hardswish"),
    (timm_act.HardSwishMe(), "hardswish"),
    (timm_act.HardSigmoidMe(), None),
    *(
        (SquaredReLU(inplace=True), "relu_squared"),
        (BloomGelu(), "gelu_tanh"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
    ),
    *((cls(), None) for cls in (nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.ReLU6, nn.Hardsigmoid, nn.LogSigmoid)),
    *((cls(), None) for cls in (nn.Tanhshrink, nn.Softsign, nn.Hardtanh, nn.Softshrink, nn.Hardshrink)),
]


@pytest.mark.parametrize(("module", "name"), RECOGNISED, ids=lambda value: getattr(value, "_get_name", lambda: value)())
def test_known_activations_are_named_after_what_they_compute(module, name):
    assert activation_name(module) == name
    assert is_known_activation(module)
    if name:
        x = grid(-6, 6, 2001)
        torch.testing.assert_close(module(x.clone()), FUNCTIONS[name](x.clone()), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "module",
    [nn.Softmax(-1), nn.GLU(), nn.RReLU(), nn.PReLU(4), nn.Identity(), nn.Linear(2, 2), nn.Sequential(nn.GELU())],
    ids=lambda module: module._get_name(),
)
def test_other_modules_are_unknown(module):
    assert activation_name(module) is None
    assert not is_known_activation(module)


# ---- fit_for


@pytest.mark.parametrize("form", FORMS)
def test_presets_are_used_for_the_classes_that_compute_them(form):
    for module, name in ((nn.GELU(), "gelu"), (GELUActivation(), "gelu"), (ReLUSquaredActivation(), "relu_squared")):
        assert fit_for(module, (-6, 6), [5, 4], form) is PRESETS[name, form]


def test_other_settings_are_fitted_once():
    interval, degrees = (-4.0, 9.0), (4, 2)
    fit = fit_for(nn.GELU(), interval, degrees, "sum-of-abs")
    assert fit == fit_rational(F.gelu, interval, degrees, "sum-of-abs")
    assert fit_for(GELUActivation(), interval, degrees, "sum-of-abs") is fit
    assert fit_for(nn.GELU(approximate="tanh"), interval, degrees, "sum-of-abs") != fit

    leaky = [fit_for(nn.LeakyReLU(slope), interval, degrees, "abs-of-sum") for slope in (0.1, 0.1, 0.3)]
    assert leaky[0] is leaky[1]
    assert leaky[2] == fit_rational(nn.LeakyReLU(0.3), interval, degrees)


def test_a_density_bypasses_presets():
    density = torch.exp(-((grid(-6, 6, 64) + 1) ** 2) / 2)
    fit = fit_for(nn.SiLU(), (-6.0, 6.0), (5, 4), "abs-of-sum", density)
    assert fit == fit_rational(F.silu, density=density)
    assert fit != PRESETS["silu", "abs-of-sum"]


def test_unknown_modules_are_fitted_by_their_own_forward():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self._factor = factor

        def forward(self, x):
            return self._factor * F.silu(x)

    one, two = (fit_for(Scaled(factor), (-6.0, 6.0), (5, 4), "abs-of-sum") for factor in (1.0, 2.0))
    assert two.max_error == pytest.approx(2 * one.max_error, rel=1e-6)


@pytest.mark.parametrize("module", [nn.ReLU6(inplace=True), nn.ELU(inplace=True)])
def test_modules_that_work_in_place_anywhere(module):
    fit = fit_for(module.to("meta", torch.bfloat16), (-5.0, 8.0), (5, 4), "abs-of-sum")
    x = grid(-5, 8)
    assert (fit(x) - module(x.clone())).abs().max().item() == pytest.approx(fit.max_error, rel=0.01)
    assert fit.max_error < 0.5


@pytest.mark.parametrize("module", [nn.PReLU(), nn.PReLU(8), XIELUActivation()], ids=lambda module: module._get_name())
def test_learnable_activations_are_refused(module):
    with pytest.raises(AdapterError, match="parameters of its own"):
        fit_for(module, (-6.0, 6.0), (5, 4), "abs-of-sum")
