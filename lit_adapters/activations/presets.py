"""Which modules are pointwise activations, and the rational function that replaces each.

`PRESETS` holds fits on [-6, 6] with degrees (5, 4), one for each activation and form of the denominator.
`python -m lit_adapters.activations.presets` computes them again and prints the table.
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

# Classes are recognised by path and name, so that neither timm nor transformers is imported.
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

# Pointwise activations without a preset.
_OTHERS = {
    _TORCH: (
        "CELU",
        "ELU",
        "SELU",
        "LeakyReLU",
        "PReLU",
        "ReLU6",
        "Threshold",
        "Hardtanh",
        "Hardsigmoid",
        "LogSigmoid",
        "Softplus",
        "Softsign",
        "Hardshrink",
        "Softshrink",
        "Tanhshrink",
    ),
    _TIMM: ("HardMish", "HardSigmoid", "PReLU"),
    _TRANSFORMERS: (
        "ClippedGELUActivation",
        "LaplaceActivation",
        "LinearActivation",
        "SqrtSoftplusActivation",
        "XIELUActivation",
    ),
}

_fits: dict[tuple[object, ...], RationalFit] = {}


def activation_name(module: nn.Module) -> str | None:
    """The name of the preset for the class of `module`, such as "gelu_tanh"; None for classes without a preset."""
    path, name = _class(module)
    preset = _NAMES.get(path, {}).get(name)
    return "gelu_tanh" if preset == "gelu" and getattr(module, "approximate", "none") == "tanh" else preset


def is_known_activation(module: nn.Module) -> bool:
    """Whether `module` is of a known class of activations, and treats all elements alike.

    True also for a PReLU with a single slope and for xIELU, which `fit_for` refuses because they have parameters.
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
    """The rational function that replaces `module`: a preset if one matches, otherwise a fit of its forward.

    Known activations of one kind are fitted once. The forward runs in float64 on the CPU, whatever the model's device.

    Args:
        module: An elementwise activation.
        interval: As for `fit_rational`.
        degrees: As for `fit_rational`.
        denominator: As for `fit_rational`.
        density: As for `fit_rational`.

    Raises:
        AdapterError: The module has parameters, or one of the conditions of `fit_rational` holds.
    """
    if next(module.parameters(), None) is not None:
        raise AdapterError(
            f"{type(module).__name__} has parameters of its own, so that a rational function with fixed coefficients "
            "cannot replace it; leave it out of the targets"
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
    """Path and name of the class. timm's memory-efficient variants count as the plain ones: they compute the same."""
    cls = type(module)
    return cls.__module__.removesuffix("_me"), cls.__name__.removesuffix("Me")


def _settings(module: nn.Module) -> list[str]:
    """The module's own attributes, such as a negative slope."""
    inherited = {*vars(nn.Module()), "inplace"}
    return sorted(f"{key}={value!r}" for key, value in vars(module).items() if key not in inherited)


PRESETS: dict[tuple[str, Denominator], RationalFit] = {
    ("gelu", "abs-of-sum"): RationalFit(
        (-0.003731646057, 0.5, 0.4202992167, 0.1261506527, 0.01594382377, 0.0007084305325),
        (0.0, 0.2523013054, 0.0, 0.001416861065),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0037316,
    ),
    ("gelu_tanh", "abs-of-sum"): RationalFit(
        (-0.003672147052, 0.5, 0.4197119247, 0.1254568806, 0.01573878307, 0.000690646579),
        (0.0, 0.2509137612, 0.0, 0.001381293158),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0036721,
    ),
    ("quick_gelu", "abs-of-sum"): RationalFit(
        (0.0009567657214, 0.5, 0.4200523848, 0.1404192649, 0.02157079075, 0.001258238614),
        (0.0, 0.2808385297, 0.0, 0.002516477228),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0022872,
    ),
    ("silu", "abs-of-sum"): RationalFit(
        (6.865248104e-05, 0.5, 0.249777528, 0.05216618796, 0.005360138825, 0.0002252103612),
        (0.0, 0.1043323759, 0.0, 0.0004504207224),
        "abs-of-sum",
        (-6.0, 6.0),
        0.00020867,
    ),
    ("relu", "abs-of-sum"): RationalFit(
        (0.06784318708, 0.5, 0.8342077146, 0.4964536159, 0.1172731079, 0.009389600969),
        (0.0, 0.9929072319, 0.0, 0.01877920194),
        "abs-of-sum",
        (-6.0, 6.0),
        0.067843,
    ),
    ("relu_squared", "abs-of-sum"): RationalFit(
        (0.009548361018, 0.2434974735, 0.4396459033, 0.2556681973, 0.05810400482, 0.004483432032),
        (-0.1797310204, 0.2090239151, -0.01947731614, 0.001419017837),
        "abs-of-sum",
        (-6.0, 6.0),
        0.036492,
    ),
    ("relu_squared", "sum-of-abs"): RationalFit(
        (-0.01501375123, 0.2799893078, 0.5607443311, 0.3275486377, 0.07337414788, 0.005560990336),
        (0.08779703967, 0.1296444114, 0.0, 0.0001679855044),
        "sum-of-abs",
        (-6.0, 6.0),
        0.063638,
    ),
    ("mish", "abs-of-sum"): RationalFit(
        (0.001309722489, 0.6038454109, 0.268264842, 0.05890506569, 0.007747783996, 0.0004568824344),
        (-0.08064344826, 0.1762942496, -0.009905769757, 0.001449785825),
        "abs-of-sum",
        (-6.0, 6.0),
        0.0019876,
    ),
    ("mish", "sum-of-abs"): RationalFit(
        (0.0003605898179, 0.6058912369, 0.3185823602, 0.0850243074, 0.01279183249, 0.000801306504),
        (0.0, 0.1814241188, 0.0, 0.001424684541),
        "sum-of-abs",
        (-6.0, 6.0),
        0.0047688,
    ),
    ("hardswish", "abs-of-sum"): RationalFit(
        (0.01182001003, 0.5, 0.07155942895, 0.4268599393, 0.2082905691, 0.02380642728),
        (0.0, 0.8537198785, 0.0, 0.04761285456),
        "abs-of-sum",
        (-6.0, 6.0),
        0.10229,
    ),
    ("tanh", "abs-of-sum"): RationalFit(
        (0.0, 0.9995902575, 0.0, 0.0989383743, 0.0, 0.0005798618599),
        (0.0, 0.4311955462, 0.0, 0.01184166949),
        "abs-of-sum",
        (-6.0, 6.0),
        0.00024426,
    ),
    ("sigmoid", "abs-of-sum"): RationalFit(
        (0.5, 0.2499985496, 0.05512574855, 0.006731291414, 0.0004555682709, 1.360561907e-05),
        (0.0, 0.1102514971, 0.0, 0.0009111365417),
        "abs-of-sum",
        (-6.0, 6.0),
        1.7013e-06,
    ),
}
# If b_1 = b_3 = 0 and b_2, b_4 >= 0, both forms are the same function, and the table above has it once.
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
