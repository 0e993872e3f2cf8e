"""Which modules are pointwise activations, and the rational function that stands for each.

`PRESETS` holds fits on [-6, 6] with degrees (5, 4), one per activation and form of the denominator, each made for the
form it is stored under. `python -m lit_adapters.activations.presets` prints the literal anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.activations.fitting import RationalFit, fit_rational
from lit_adapters.errors import AdapterError
from lit_adapters.ops.rational import Denominator

# Classes are known by path and name, so that neither timm nor transformers is imported.
_TORCH, _TIMM, _TRANSFORMERS = "torch.nn.modules.activation", "timm.layers.activations", "transformers.activations"

_NAMES = {
    _TORCH: {
        "GELU": "gelu",
        "SiLU": "silu",
        "ReLU": "relu",
        "Mish": "mish",
        "Hardswish": "hardswish",
        "Tanh": "tanh",
        "Sigmoid": "sigmoid",
    },
    _TIMM: {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "Swish": "silu",
        "Mish": "mish",
        "HardSwish": "hardswish",
        "Tanh": "tanh",
        "Sigmoid": "sigmoid",
    },
    "timm.models.metaformer": {"SquaredReLU": "relu_squared"},
    _TRANSFORMERS: {
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "FastGELUActivation": "gelu_tanh",
        "AccurateGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu",
        "SiLUActivation": "silu",
        "ReLUSquaredActivation": "relu_squared",
        "MishActivation": "mish",
    },
    "transformers.models.bloom.modeling_bloom": {"BloomGelu": "gelu_tanh"},
    "transformers.models.lxmert.modeling_lxmert": {"GeLU": "gelu"},
}

# Pointwise as well, but without a preset.
_OTHERS = {
    _TORCH: (
        *("CELU", "ELU", "SELU", "LeakyReLU", "PReLU", "ReLU6", "Threshold", "Hardtanh", "Hardsigmoid", "LogSigmoid"),
        *("Softplus", "Softsign", "Hardshrink", "Softshrink", "Tanhshrink"),
    ),
    _TIMM: ("HardMish", "HardSigmoid", "PReLU"),
    _TRANSFORMERS: (
        *("ClippedGELUActivation", "LaplaceActivation", "LinearActivation", "SqrtSoftplusActivation"),
        "XIELUActivation",
    ),
}

_fits: dict[tuple[object, ...], RationalFit] = {}


def activation_name(module: nn.Module) -> str | None:
    """The preset that `module` computes, such as "gelu_tanh"; None for classes without a preset."""
    path, name = _class(module)
    preset = _NAMES.get(path, {}).get(name)
    return "gelu_tanh" if preset == "gelu" and getattr(module, "approximate", "none") == "tanh" else preset


def is_known_activation(module: nn.Module) -> bool:
    """Whether `module` is of a known class of activations that treat all elements alike.

    True for a PReLU with a single slope, and for xIELU, which `fit_for` then refuses with a reason.
    """
    path, name = _class(module)
    known = activation_name(module) is not None or name in _OTHERS.get(path, ())
    return known and all(parameter.numel() == 1 for parameter in module.parameters())


def fit_for(
    module: nn.Module,
    interval: tuple[float, float],
    degrees: tuple[int, int],
    denominator: Denominator,
    density: Tensor | None = None,
) -> RationalFit:
    """The rational function that stands for `module`: the preset where one matches, a fit of its forward otherwise.

    Known activations of one kind are fitted once. The forward runs in float64 on the CPU, wherever the model lives.
    Arguments as in `fit_rational`.

    Raises:
        AdapterError: the module has parameters, or `fit_rational` refuses.
    """
    if next(module.parameters(), None) is not None:
        raise AdapterError(
            f"{type(module).__name__} has parameters of its own, so it is no fixed function that a rational could "
            "stand for; leave it out of the targets"
        )
    name = activation_name(module)
    interval = tuple(float(end) for end in interval)  # type: ignore[assignment]
    preset = PRESETS.get((name, denominator)) if name and density is None else None
    if preset and (preset.interval, preset.degrees) == (interval, tuple(degrees)):
        return preset

    function = copy.deepcopy(module).eval().forward
    if density is not None or not is_known_activation(module):
        return fit_rational(function, interval, degrees, denominator, density)
    key = (name or (*_class(module), *_settings(module)), interval, tuple(degrees), denominator)
    if key not in _fits:
        _fits[key] = fit_rational(function, interval, degrees, denominator)
    return _fits[key]


def _class(module: nn.Module) -> tuple[str, str]:
    """Path and name of the class; timm's memory-efficient variants count as the plain ones, whose values they have."""
    cls = type(module)
    return cls.__module__.removesuffix("_me"), cls.__name__.removesuffix("Me")


def _settings(module: nn.Module) -> list[str]:
    """The module's own attributes, such as a negative slope."""
    inherited = {*vars(nn.Module()), "inplace"}
    return sorted(f"{key}={value!r}" for key, value in vars(module).items() if key not in inherited)


PRESETS: dict[tuple[str, Denominator], RationalFit] = {
    ("gelu", "abs-of-sum"): RationalFit(
        (-0.003727911135, 0.5, 0.4202823604, 0.1261264936, 0.01593479933, 0.0007074574076),
        (0.0, 0.2522529872, 0.0, 0.001414914815),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0037279,
    ),
    ("gelu_tanh", "abs-of-sum"): RationalFit(
        (-0.003668232426, 0.5, 0.4196943195, 0.1254316885, 0.01572937535, 0.0006896322041),
        (0.0, 0.2508633771, 0.0, 0.001379264408),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0036682,
    ),
    ("quick_gelu", "abs-of-sum"): RationalFit(
        (0.0009531344484, 0.5, 0.4200697222, 0.1404452996, 0.02158044409, 0.001259266985),
        (0.0, 0.2808905991, 0.0, 0.00251853397),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0023204,
    ),
    ("silu", "abs-of-sum"): RationalFit(
        (6.831065416e-05, 0.5, 0.2497784589, 0.05216863691, 0.005360990105, 0.0002252919506),
        (0.0, 0.1043372738, 0.0, 0.0004505839012),
        "abs-of-sum",
        (-6.0, 6.0),
        0.00021263,
    ),
    ("relu", "abs-of-sum"): RationalFit(
        (0.06782238912, 0.5, 0.8346847755, 0.4970604822, 0.1174970285, 0.009414167581),
        (0.0, 0.9941209643, 0.0, 0.01882833516),
        "abs-of-sum",
        (-6.0, 6.0),
        0.067822,
    ),
    ("relu_squared", "abs-of-sum"): RationalFit(
        (0.009512412795, 0.243274865, 0.4396904022, 0.2559207138, 0.05820992168, 0.004495227582),
        (-0.1798037745, 0.2093636274, -0.01952145888, 0.001423429991),
        "abs-of-sum",
        (-6.0, 6.0),
        0.036412,
    ),
    ("relu_squared", "sum-of-abs"): RationalFit(
        (-0.01499166631, 0.2797818181, 0.5607448151, 0.3277919675, 0.07348314915, 0.005573385951),
        (0.08786285031, 0.1298368925, 0.0, 0.0001684861219),
        "sum-of-abs",
        (-6.0, 6.0),
        0.064555,
    ),
    ("mish", "abs-of-sum"): RationalFit(
        (0.001286338975, 0.6038518729, 0.2685680569, 0.05909558303, 0.007791263989, 0.0004602847829),
        (-0.0802057198, 0.1763999831, -0.009844922258, 0.001452042331),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0020139,
    ),
    ("mish", "sum-of-abs"): RationalFit(
        (0.0003625319955, 0.6058987805, 0.3185792959, 0.08502384915, 0.01279324415, 0.0008015950544),
        (0.0, 0.1814271705, 0.0, 0.001425091898),
        "sum-of-abs",
        (-6.0, 6.0),
        0.0048175,
    ),
    ("hardswish", "abs-of-sum"): RationalFit(
        (0.01183132963, 0.5, 0.07185235218, 0.4236243389, 0.2068656805, 0.02366076126),
        (0.0, 0.8472486779, 0.0, 0.04732152251),
        "abs-of-sum",
        (-6.0, 6.0),
        0.10216,
    ),
    ("tanh", "abs-of-sum"): RationalFit(
        (0.0, 0.9995917823, 0.0, 0.09895385107, 0.0, 0.0005802449444),
        (0.0, 0.4312144959, 0.0, 0.01184593651),
        "abs-of-sum",
        (-6.0, 6.0),
        0.00024794,
    ),
    ("sigmoid", "abs-of-sum"): RationalFit(
        (0.5, 0.2499985572, 0.05512635864, 0.006731588657, 0.0004556214337, 1.360901503e-05),
        (0.0, 0.1102527173, 0.0, 0.0009112428674),
        "abs-of-sum",
        (-6.0, 6.0),
        1.7409e-06,
    ),
}
# Where b_1 = b_3 = 0 and b_2, b_4 >= 0 both forms are one function, and the table above has it once.
PRESETS |= {
    (name, "sum-of-abs"): replace(fit, form="sum-of-abs")
    for (name, _), fit in PRESETS.items()
    if (name, "sum-of-abs") not in PRESETS
}


def _print_table() -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": F.silu,
        "relu": F.relu,
        "relu_squared": lambda x: F.relu(x).square(),
        "mish": F.mish,
        "hardswish": F.hardswish,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    for name, function in functions.items():
        fits = [fit_rational(function, denominator=form) for form in get_args(Denominator)]
        for fit in fits[: 1 if fits[0].denominator == fits[1].denominator else 2]:
            a, b = (", ".join(repr(float(f"{c:.10g}")) for c in row) for row in (fit.numerator, fit.denominator))
            print(f'    ("{name}", "{fit.form}"): RationalFit(\n        ({a}),\n        ({b}),')
            print(f'        "{fit.form}",\n        {fit.interval},\n        {fit.max_error:.5g},\n    ),')


if __name__ == "__main__":
    _print_table()
