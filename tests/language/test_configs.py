"""Every recipe runs: the smoke ones as they are, the others with the tiny model, all through the real command line."""

from __future__ import annotations

import functools
import math
from pkgutil import resolve_name

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

import lit_adapters as la
from language.models import SMOLLM2
from language.module import CausalLMTuner
from lit_adapters.methods.method import to_methods
from tests.language.tiny import CONFIGS, batch, command, events, log_dir
from tests.tiers import fast_only

REGIMES = {"dpo", "grpo", "draft"}  # recipes of other entry points, which have tests of their own
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml") if path.stem not in REGIMES
)
SMOKE = [name for name in RECIPES if name.startswith("smoke/")]
REAL = [name for name in RECIPES if name not in SMOKE]
ARMS = {"lora", "dora", "vera", "lora2", "loran", "afa", "dense_lora", "nested_lora"}
ARMS |= {"nora", "nora_plus_plus", "bitfit", "group_affine", "qlora"}
OVERRIDES = [
    "--model.model=tiny_llama",
    "--data.format=alpaca",
    "--data.use_chat_template=false",
    "--data.batch_size=4",
    "--data.max_length=400",
    "--data.train_subset=4",
    "--data.val_subset=2",
    "--data.val_fraction=0.2",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=true",
]
SHAPES = {
    "meta-llama/Meta-Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "meta-llama/Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    SMOLLM2: {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
}
HEADS = {"meta-llama/Meta-Llama-3-8B": (32, 8), "meta-llama/Llama-3.2-1B": (32, 8), SMOLLM2: (9, 3)}


# Recipes with rows of their own kind.
TASKS = {
    "samsum_loran": ("summarisation", [{"dialogue": f"A: hi {i}\nB: hello", "summary": "they meet"} for i in range(8)]),
    "newsgroups_loran": ("classification", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]),
}


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch, tmp_path):
    """LightningCLI warns when it is given arguments and the process has some too; what is written is temporary."""
    monkeypatch.setattr("sys.argv", ["language"])
    monkeypatch.chdir(tmp_path)


def test_the_recipes_are_complete():
    groups = {name.split("/")[0] for name in RECIPES}
    assert groups == {"smoke", "llama3_8b", "llama32_1b", "smollm2"}
    for group in groups:
        wanted = ARMS if group == "llama3_8b" else ARMS | {"full"}
        wanted = wanted if group == "smoke" else wanted | set(TASKS)
        assert {name.split("/")[1] for name in RECIPES if name.startswith(f"{group}/")} >= wanted, group


# Two to five seconds each: the others are in the slow tier.
FAST_SMOKE = {"smoke/nora_plus_plus", "smoke/qlora"}


@pytest.mark.parametrize("name", fast_only(FAST_SMOKE, SMOKE))
def test_smoke_recipes_fit_and_load(tmp_path, name):
    fitted = command("fit", name, tmp_path)
    assert fitted.trainer.global_step == 4
    board = events(log_dir(fitted))
    tags = board.Tags()
    assert {"train/loss", "train/learned_tokens", "val/loss", "val/perplexity"} <= set(tags["scalars"])
    assert ("adapter/functions" in tags["images"]) == ("nora" in name or "affine" in name)
    assert any(t.startswith("adapter/summary/") for t in tags["scalars"]) == (
        name not in ("smoke/full", "smoke/lora_pre")
    )
    rates = [tag for tag in tags["scalars"] if tag.startswith("lr-")]
    assert rates
    assert all(board.Scalars(tag)[-1].value < 0.01 * max(r.value for r in board.Scalars(tag)) for tag in rates)

    path = log_dir(fitted) / "checkpoints" / "last.ckpt"
    rows = batch(9, 14)
    with torch.no_grad():
        loaded = CausalLMTuner.load_from_checkpoint(path).eval()
        assert torch.equal(loaded(rows), fitted.model.eval()(rows))
    if name != "smoke/lora":
        return
    tested = command("test", name, tmp_path, f"--ckpt_path={path}")
    measured = {k: v.item() for k, v in tested.trainer.callback_metrics.items()}
    assert measured == pytest.approx(fitted.trainer.test(loaded, datamodule=fitted.datamodule, verbose=False)[0])
    assert measured["test/perplexity"] == pytest.approx(math.exp(measured["test/loss"]), rel=1e-5)


# A second each: the others are in the slow tier.
QUICK = {"smollm2/nora", "llama3_8b/newsgroups_loran", "llama3_8b/openorca_nora_plus_plus"}


@pytest.mark.parametrize("name", fast_only(QUICK, REAL))
def test_other_recipes_run_on_the_tiny_model(tmp_path, write, name):
    # 64 is more than the tiny one has.
    changes = ["--model.adapters.rank=4"] if name.endswith(("loran", "qlora", "nested_lora")) else []
    changes += ["--model.adapters.inner_rank=2"] if name.endswith("nested_lora") else []
    if own := TASKS.get(name.split("/")[1]):
        assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["format"] == own[0]
        changes += [f"--data.format={own[0]}", f"--data.path={write(own[1])}", "--data.columns=null"]
    cli = command("fit", name, tmp_path, *OVERRIDES, *changes)
    assert ("val/classification_accuracy" in cli.trainer.callback_metrics) == ("newsgroups" in name)
    assert cli.trainer.global_step == 1
    optimizer, scheduler = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0]
    assert type(optimizer) is resolve_name(cli.config.fit.optimizer.class_path)
    assert scheduler.interval == "step"
    assert scheduler.scheduler.total_steps == 1
    scale = cli.config.fit.lr_scale
    rates = {g["name"]: g["max_lr"] / scale.get(g["name"].partition("/")[0], 1.0) for g in optimizer.param_groups}
    assert list(rates.values()) == pytest.approx([cli.config.fit.optimizer.init_args.lr] * len(rates))


@functools.cache
def meta_model(name: str) -> torch.nn.Module:
    heads, groups = HEADS[name]
    config = LlamaConfig(
        **SHAPES[name],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=49152 if name == SMOLLM2 else 128256,
        tie_word_embeddings=name != "meta-llama/Meta-Llama-3-8B",
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_architectures_have_the_sizes_of_the_models():
    sizes = {name: sum(p.numel() for p in meta_model(name).parameters()) for name in SHAPES}
    assert sizes == {
        "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
        "meta-llama/Llama-3.2-1B": 1_235_814_400,
        SMOLLM2: 134_515_008,
    }


@pytest.mark.parametrize("name", REAL)
def test_other_recipes_fit_their_own_model(name):
    """Without weights: every method finds its targets in the architecture, and groups divide its channels."""
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    section = recipe["model"]
    model, blocks = meta_model(section["model"]), SHAPES[section["model"]]["num_hidden_layers"]
    arm = name.split("/")[1].removeprefix("openorca_").removeprefix("samsum_").removeprefix("newsgroups_")
    for method in to_methods(section["adapters"]):
        for part in method.parts():
            found = [target for target, _ in part.find(model, section.get("train", ()))]
            places = {t.name.split(".layers.")[1].partition(".")[2] for t in found}
            assert len(found) == blocks * len(places)
            if part.name in ("nora", "group_affine"):
                assert places == {"mlp.act_fn"}
                assert SHAPES[section["model"]]["intermediate_size"] % part.groups == 0
            elif arm in ("loran", "qlora"):
                assert places == {"self_attn.q_proj", "self_attn.v_proj"}
            else:
                assert len(places) == 7
                assert not any("lm_head" in t.name for t in found)
    assert recipe["lr_scheduler"]["init_args"]["max_lr"] == recipe["optimizer"]["init_args"]["lr"]
    packed = arm == "qlora" or (arm == "loran" and "llama" in section["model"]) or name.split("/")[1] in TASKS
    assert ("quantization" in section) == packed


def test_the_constants_that_loran_published():
    files = [f"{g}/{a}" for g in ("llama3_8b", "llama32_1b", "smollm2") for a in TASKS]
    for name in ("llama3_8b/loran", "llama32_1b/loran", *files):
        section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
        (method,) = to_methods(section["adapters"])
        expected = la.LoRAN(
            rank=64, alpha=16.0, dropout=0.2, targets=["q_proj", "v_proj"], amplitude=5e-5, frequency=1e4
        )
        assert method == expected
        assert section["quantization"] == "nf4"
