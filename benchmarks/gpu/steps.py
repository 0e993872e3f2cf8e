"""What does a training step cost in time and memory, for each method, beside peft's and full fine-tuning?

The LLaMA's weights are bfloat16, the ViT's float32; both compute under bfloat16 autocast, and adapters are float32.
Full fine-tuning of the LLaMA keeps its weights and AdamW's state in bfloat16, which is less than usual. A step is
forward, loss, backward and AdamW.

Memory: each arm alone, with a model of its own that is freed before the next. Time: all arms that ran take turns in one
process, and share the frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch.optim import AdamW

from benchmarks.against_peft import METHODS
from benchmarks.arms import ARMS, STEPS, names
from benchmarks.gpu.models import MODELS, batch, sharing, with_arm
from benchmarks.gpu.setting import Record, Setting, attempt
from benchmarks.timing import ratios, spread, training_step
from lit_adapters.ops import set_rational_backend

TABLES = {"llama": STEPS["smollm2"], "vit": STEPS["vit"]}


def llama(setting: Setting) -> Iterator[Record]:
    """Steps of the LLaMA."""
    return steps(setting, "llama")


def vit(setting: Setting) -> Iterator[Record]:
    """Steps of the ViT."""
    return steps(setting, "vit")


def arms(name: str) -> list[tuple[str, str]]:
    """Arm and library: those with a row in the table of such a model that train with AdamW, and peft's."""
    ours = dict.fromkeys(["frozen", *(arm for arm in names(TABLES[name]) if ARMS[arm].optimizer is AdamW)])
    return [(arm, "ours") for arm in ours if arm != "head"] + [(arm, "peft") for arm in METHODS]


def steps(setting: Setting, name: str) -> Iterator[Record]:
    """One record on memory for each arm, then one on time."""
    set_rational_backend("triton")
    sizes, loss = batch(setting, name)
    ran = []
    for arm, library in arms(name):
        key = {"model": name, "arm": arm, "library": library, "what": "memory"}
        found = attempt(key, partial(memory, setting, name, arm, library))
        if "error" not in found:
            ran.append((arm, library))
        yield found
    setting.forget_peak()
    base = MODELS[name](setting).requires_grad_(False)
    functions: dict[str, Callable[[], None]] = {}
    for arm, library in ran:
        model = with_arm(MODELS[name](setting) if arm == "full" else sharing(base), name, arm, library)
        functions[f"{arm} {library}"] = training_step(model, partial(loss, model))
    rounds = setting.choose(9, 2)
    times = setting.in_turns(functions, rounds)
    for arm, library in ran:
        key = f"{arm} {library}"
        others = {"over_frozen": "frozen ours", "over_full": "full ours"}
        if library == "ours":
            others["over_peft"] = f"{arm} peft"
        yield {
            "model": name,
            "arm": arm,
            "library": library,
            "what": "time",
            "seconds": spread(times[key]),
            **{field: ratios(times, key, other) for field, other in others.items() if other in times},
            **sizes,
            "rounds": rounds,
        }


def memory(setting: Setting, name: str, arm: str, library: str) -> Record:
    """The most memory of three steps, the model included, and how many numbers train."""
    setting.forget_peak()
    model = with_arm(MODELS[name](setting), name, arm, library)
    _, loss = batch(setting, name)
    step = training_step(model, partial(loss, model))
    for _ in range(setting.choose(3, 1)):
        step()
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), **setting.peak()}
