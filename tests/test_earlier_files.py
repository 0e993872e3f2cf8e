"""Files that version 0.1 wrote, in fixtures/version_0_1: they load, go on and say what they did then."""

import runpy
import sys
import warnings
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file

import lit_adapters as la
from language.pairs import PreferenceDataModule
from tests.fixtures.version_0_1.network import Net, inputs, wave
from tests.tiers import fast_only

FOLDER = Path(__file__).parent / "fixtures" / "version_0_1"
DIRECTORIES = sorted(path.name for path in (FOLDER / "adapters").iterdir())
ANSWERS = load_file(FOLDER / "answers.safetensors")
ENDS = load_file(FOLDER / "ends.safetensors")  # of the uninterrupted runs
DATA = {"sft": "rows", "dpo": "pairs", "grpo": "questions", "draft": "rows"}
COMMANDS = {"vision": "vision", "sft": "language"} | {name: f"language.{name}" for name in ("dpo", "grpo", "draft")}
TOLERANCE = 1e-3  # of each tensor's own way since the checkpoint; other processors' rounding makes 1e-5
CLASSES = {
    "vision": ("vision", "ViTClassifier"),
    "sft": ("language", "CausalLMTuner"),
    "dpo": ("language.dpo", "DPOTuner"),
    "grpo": ("language.grpo", "GRPOTuner"),
    "draft": ("language.draft", "DraftTuner"),
}


def read(path):
    return torch.load(path, weights_only=True)


def loaded(name):
    """The module of a checkpoint; in version 0.1 packages did not offer their tuner, but had it in a file."""
    where, kind = CLASSES[name]
    package = import_module(where)
    module = package if hasattr(package, kind) else import_module(f"{where}.module")
    return getattr(module, kind).load_from_checkpoint(FOLDER / f"{name}.ckpt", map_location="cpu").eval()


def resumed(name, folder, monkeypatch):
    """What `python -m MODULE fit --ckpt_path` ends with."""
    fit = {"fit": LightningCLI.subcommands()["fit"]}
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: fit))  # the other parsers take seconds
    options = [f"--config={FOLDER / name}.yaml", f"--ckpt_path={FOLDER / name}.ckpt"]
    options += [f"--trainer.logger.init_args.save_dir={folder}"]
    options += [f"--data.path={FOLDER / DATA[name]}.jsonl"] if name in DATA else []
    monkeypatch.setattr(sys, "argv", ["python", "fit", *options])
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
    return read(folder / name / "version_0" / "checkpoints" / "last.ckpt")


def distance(first, second):
    return (first.double() - second.double()).norm().item()


def near(answer, name):
    """Whether an answer is the one of then, but for the rounding of another processor."""
    return distance(answer, ANSWERS[name]) <= 1e-5 * ANSWERS[name].norm().item()


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_adapter_directory_loads(name):
    net = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights")  # than those the adapters were trained on
        la.load_adapters(net, FOLDER / "adapters" / name)
    assert near(net(inputs()), name)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_adapter_directory_is_written_as_before(name, tmp_path):
    net = Net()
    la.load_adapters(net, FOLDER / "adapters" / name)
    la.save_adapters(net, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    before, now = load_file(FOLDER / "adapters" / name / file.name), load_file(file)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[key], now[key]) for key in before)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_checkpoint_loads(name):
    tokens = 7 * torch.arange(24).view(2, 12) % 256
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        answer = loaded(name)(wave(2, 3, 32, 32) if name == "vision" else batch)
    assert near(answer if name == "vision" else answer[:, -1], name)


def test_a_checkpoint_is_validated():
    pairs = PreferenceDataModule(f"{FOLDER}/pairs.jsonl", "tiny_llama", max_length=96, val_fraction=0.2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (metrics,) = trainer.validate(loaded("dpo"), pairs)
    values = torch.tensor([metrics[key] for key in sorted(metrics)])
    assert near(values, "validated")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", fast_only(["sft", "vision"], COMMANDS))
def test_a_run_goes_on_from_its_checkpoint(name, tmp_path, monkeypatch):
    start, end = read(FOLDER / f"{name}.ckpt"), resumed(name, tmp_path, monkeypatch)
    want = {key: ENDS[f"{name}/{key}"] for key in start["state_dict"]}
    assert end["global_step"] > start["global_step"]
    assert end["state_dict"].keys() == want.keys()
    moved = {key: distance(start["state_dict"][key], tensor) for key, tensor in want.items()}
    assert max(moved.values()) > 0
    missed = {key: distance(end["state_dict"][key], tensor) for key, tensor in want.items()}
    assert not [key for key in want if missed[key] > TOLERANCE * moved[key]]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_reads_a_checkpoint(name, capsys):
    (script,) = entry_points(group="console_scripts", name="lit-adapters")
    script.load()(["inspect", str(FOLDER / f"{name}.ckpt")])
    assert read(FOLDER / f"{name}.ckpt")["lit_adapters"]["module"] in capsys.readouterr().out
