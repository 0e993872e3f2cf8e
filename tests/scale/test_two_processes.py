"""Two processes on half a batch each learn what one learns on the whole, and stop together: DDP and FSDP2."""

import re
import sys
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lit_adapters as la
from language.grpo.module import clipped_objective
from language.grpo.rollouts import log_probabilities
from tests.lightning.tiny_task import assert_equal_bits, events
from tests.matrix import build
from tests.scale import applications, fsdp_run
from tests.scale.processes import run, run_in_two
from tests.scale.tasks import CASES, MEASURED, fit
from vision.module import ViTClassifier

pytestmark = pytest.mark.slow
ALIKE = [name for name in applications.APPLICATIONS if name != "grpo"]  # which samples by process
KIND_AND_APPLICATION = [("ddp", name) for name in ALIKE] + [("fsdp", name) for name in applications.SHARDED]
# What calibrates sees other batches in one process.
DDP = [f"{model}-{method}" for model, method in CASES if method not in MEASURED]
FSDP = [f"{model}-{method}" for model, method in fsdp_run.CASES if method not in MEASURED]
KIND_AND_NAME = [("ddp", name) for name in DDP] + [("fsdp", name) for name in FSDP]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run_in_two("tests.scale.run", folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of one process, and what it saw of every run that two also made."""
    folder = tmp_path_factory.mktemp("one")
    seen = {name: fit(folder, *name.split("-", 1), 1) for name in DDP}
    return folder, seen | {name: applications.fit(folder, name, 1) for name in applications.APPLICATIONS}


def scalars(folder, name) -> dict[str, list[tuple[int, float]]]:
    board: Any = events(folder.joinpath(*name.split("-", 1)) / "run")
    tags = [tag for tag in board.Tags()["scalars"] if tag != "epoch"]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


def samples(batch) -> list[Any]:
    """The rows of a batch, without padding, so that they compare however they were put together."""
    if isinstance(batch, dict):
        masks = batch["attention_mask"].bool()
        return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    return [(image.sum().item(), label.item()) for image, label in zip(*batch, strict=True)]


@pytest.mark.parametrize("name", DDP)
def test_ddp_equals_one_process_with_the_whole_batch(one, two, name):
    alone, first, second = one[1][name], two[1]["ddp"][name], two[2]["ddp"][name]
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        torch.testing.assert_close(first["state"][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_ddp_resumes_bit_for_bit_in_mid_epoch(two):
    """Each process goes on with its own random state and its own share of the data."""
    for seen in two[1:]:
        whole, rest = seen["ddp"]["resumed"]["whole"], seen["ddp"]["resumed"]["rest"]
        assert rest["losses"] == whole["losses"][8:]
        assert_equal_bits(rest["state"], whole["state"])
    assert two[1]["ddp"]["resumed"]["whole"]["losses"] != two[2]["ddp"]["resumed"]["whole"]["losses"]


@pytest.mark.parametrize("name", FSDP)
def test_shards_equal_one_process_and_are_saved_whole(one, two, name):
    alone, first, second = one[1][name], two[1]["fsdp"][name], two[2]["fsdp"][name]
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    directory = two[0].joinpath("fsdp", *name.split("-", 1), "adapters")
    with warnings.catch_warnings():  # of other weights: the base is the one trained on
        warnings.simplefilter("error")
        la.load_adapters(build(name.split("-")[0]), directory)
    for key, value in load_file(directory / "lit_adapter.safetensors").items():
        torch.testing.assert_close(value, alone["state"][f"net.{key}"], rtol=1e-4, atol=1e-5, msg=key)


def test_every_process_holds_its_part_of_every_parameter(two):
    first, second = (seen["fsdp"]["llama-nora++"]["sizes"] for seen in two[1:])
    for key, (held, total) in first.items():
        assert held + second[key][0] == total, key
        assert held < total or total < 20, key  # one row cannot be divided


@pytest.mark.parametrize(("kind", "name"), KIND_AND_NAME)
def test_logs_once_what_one_process_logs(one, two, kind, name):
    alone, together = scalars(one[0], name), scalars(two[0] / kind, name)
    assert alone.keys() == together.keys()
    assert any(tag.startswith("adapter/summary/") for tag in alone)
    for tag, records in alone.items():
        assert [step for step, _ in together[tag]] == [step for step, _ in records], tag
        values = [value for _, value in records]
        # The ratio of norms over a batch is not the mean of the ratios over its halves, which is what is logged.
        tolerance = {"nonlinearity": 0.15, "relative_output": 0.3}.get(tag.rpartition("/")[2], 1e-3)
        assert [value for _, value in together[tag]] == pytest.approx(values, rel=tolerance, abs=1e-6), tag


@pytest.mark.parametrize("name", applications.APPLICATIONS)
def test_applications_share_out_the_order_of_one_process(one, two, name):
    batches = (seen[name]["batches"] for seen in (one[1], two[1]["ddp"], two[2]["ddp"]))
    for alone, first, second in zip(*batches, strict=True):
        taken_in_turns = [sample for pair in zip(samples(first), samples(second), strict=True) for sample in pair]
        assert taken_in_turns == samples(alone)


@pytest.mark.parametrize(("kind", "name"), KIND_AND_APPLICATION)
def test_applications_learn_and_log_the_same(one, two, kind, name):
    alone, first, second = one[1][name], two[1][kind][name], two[2][kind][name]
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["metrics"] == second["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
    for key, value in alone["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_reinforcement_learns_from_what_both_have_sampled(one, two):
    """The first step is that of one process with the completions of both."""
    first, second = two[1]["ddp"]["grpo"], two[2]["ddp"]["grpo"]
    assert first["losses"] == second["losses"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"].keys() == one[1]["grpo"]["metrics"].keys()
    assert_equal_bits(first["state"], second["state"])
    parts = [seen["sampled"]["rollout"] for seen in (first, second)]
    drawn = [{tuple(row) for row in part["input_ids"].tolist()} for part in parts]
    assert not drawn[0] & drawn[1]

    tuner, _ = applications.grpo(1)
    tuner.configure_model()
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], applications.SGD["init_args"]["lr"])
    tokens = [len(part["old"]) for part in parts]
    for part in parts:
        new = log_probabilities(tuner.forward, part, 1.0)
        terms = clipped_objective(new, part["old"], part["advantages"], part["reference"], 0.2, 0.2, 0.1)
        (terms.loss / sum(tokens)).backward()
    optimizer.step()
    for key, value in applications.learned(tuner).items():
        torch.testing.assert_close(first["sampled"]["state"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_learned_tokens_survive_another_number_of_processes(one, two, tmp_path):
    """Two processes count what one counts; one goes on from there, whoever saved."""
    counted = one[1]["language"]["metrics"]["train/learned_tokens"]
    both, alone = two[0] / "ddp" / "language" / "last.ckpt", one[0] / "language" / "last.ckpt"
    assert all(torch.load(path, weights_only=True)["learned_tokens"] == counted for path in (both, alone))
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        goes_on = applications.fit(tmp_path, "language", 1, ckpt=both, max_epochs=2)["metrics"]["train/learned_tokens"]
    assert goes_on == applications.fit(tmp_path, "language", 1, max_epochs=2)["metrics"]["train/learned_tokens"]


def test_adaptive_annealing_has_moved_alike(one, two):
    betas = [seen["vit-adaptive"]["state"]["net.blocks.0.mlp.fc1.beta"].item() for seen in (one[1], two[1]["ddp"])]
    assert betas[0] == betas[1] < 1


def test_calibration_is_the_first_process_s(two):
    """It is measured on that one's batches; how the parameters are laid out makes no difference."""
    first, second = (seen["ddp"]["vit-calibrated"] for seen in two[1:])
    assert first["losses"] == second["losses"]
    # DDP would send the first one's buffers along with each pass; FSDP2 sends none.
    assert two[1]["fsdp"]["vit-calibrated"]["losses"] == pytest.approx(first["losses"], rel=1e-5)
    sharded = load_file(two[0] / "fsdp" / "vit" / "calibrated" / "adapters" / "lit_adapter.safetensors")
    for i in (0, 1):
        for key in ("calibrated", "fit_range", "base_numerator", "numerator_scale", "density"):
            name = f"blocks.{i}.mlp.act.{key}"
            assert torch.equal(first["state"][f"net.{name}"], second["state"][f"net.{name}"]), name
            torch.testing.assert_close(sharded[name], first["state"][f"net.{name}"], rtol=1e-5, atol=1e-6)
        assert sharded[f"blocks.{i}.mlp.act.calibrated"]
        assert sharded[f"blocks.{i}.mlp.act.fit_range"].tolist() != [-6.0, 6.0]


def test_a_start_from_gradients_is_the_first_process_s(two):
    first, second = (seen["ddp"]["vit-lora-ga"] for seen in two[1:])
    assert first["losses"] == second["losses"]
    assert_equal_bits(first["state"], second["state"])
    assert first["state"]["net.blocks.0.mlp.fc1.start_B"].any()


def test_functions_are_drawn_from_shards(two):
    board: Any = events(two[0] / "fsdp" / "vit" / "calibrated" / "run")
    assert {"adapter/functions", "adapter/changes"} <= set(board.Tags()["images"])


def test_checkpoints_of_shards_hold_adapters_alone_and_resume(one, two):
    checkpoint = torch.load(two[0] / "fsdp" / "llama" / "nora++" / "last.ckpt", weights_only=True)
    assert "net.lm_head.weight" in checkpoint["state_dict"]
    assert "net.model.embed_tokens.weight" not in checkpoint["state_dict"]
    alone = fit(one[0] / "longer", "llama", "nora++", 1, max_epochs=2)["losses"]
    assert two[1]["fsdp"]["resumed"] == pytest.approx(alone[len(alone) // 2 :], rel=1e-5)


def test_checkpoints_of_shards_load_into_a_model_of_one_process(one, two):
    model = ViTClassifier.load_from_checkpoint(two[0] / "fsdp" / "vision" / "last.ckpt")
    model.configure_model()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == one[1]["vision"]["state"].keys()
    for key, value in two[1]["fsdp"]["vision"]["state"].items():
        assert torch.equal(trained[key], value), key


def test_adapters_stay_in_float32_beside_a_base_in_bfloat16(one, two):
    seen = two[1]["fsdp"]["bf16"]
    dtypes = {n: d for n, d in seen["dtypes"].items() if "layers.0.mlp.up_proj" in n}
    assert {n.rpartition(".")[2]: d for n, d in dtypes.items()} == {
        "weight": "torch.bfloat16",
        "lora_A": "torch.float32",
        "lora_B": "torch.float32",
    }
    assert seen["losses"] == pytest.approx(one[1]["llama-lora"]["losses"], rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "case", "message"),
    [
        ("ddp", "inf", r"^the loss is inf at step 1: every layer's output is finite, so it came up in the loss\."),
        ("ddp", "bypassed", r"^1 of 2 adapters did not run: blocks\.0\.mlp\.act\. "),
        ("ddp", "uncalibrated", r"Uncallable\.predict_step, which failed \(RuntimeError: no such column\)"),
        ("fsdp", "inf", r"^the loss is inf at step 1: every layer's output is finite, so it came up in the loss\."),
        ("fsdp", "build", r"^ValueError: no such weights$"),
        ("fsdp", "scalar", r"frequency' is a single number, which FSDP2 cannot shard"),
        ("fsdp", "shared", r"^'blocks\.0\.attn\.qkv' shares dense_E and dense_D with other layers"),
        ("fsdp", "ranks", r"^'net\.blocks\.0\.attn\.qkv\.lora_A\.default' is sharded, .* use the strategy ddp"),
        (
            "fsdp",
            "measured",
            r"^'blocks\.0\.attn\.qkv' is sharded, and start='lora_ga' needs whole matrices",
        ),
        ("fsdp", "cache", r"^cache_weight of 'blocks\.0\.attn\.qkv' would keep whole weights"),
        ("fsdp", "tensor_parallel", r"\{'tensor_parallel': 2\} was asked for: give .* data_parallel_size=<"),
        ("fsdp", "distributed_checkpoint", r"set save_distributed_checkpoint=False"),
        ("fsdp", "other_adapters", r"last\.ckpt' was trained with LoRA, the model has LoRAN"),
        ("fsdp", "merge", r"^merging needs whole weights"),
        ("fsdp", "export", r"^export_peft needs whole weights"),
    ],
)
def test_what_stops_one_process_stops_both(two, kind, case, message):
    first, second = (seen[kind]["stopped"][case] for seen in two[1:])
    assert first == second
    assert re.search(message, first), first


def test_the_command_line_takes_fsdp2_from_yaml(tmp_path):
    """As docs/scaling.md has it, with Lightning's own launcher."""
    recipe = tmp_path / "fsdp2.yaml"
    recipe.write_text(
        "trainer:\n"
        "  devices: 2\n"
        "  strategy:\n"
        "    class_path: lightning.pytorch.strategies.ModelParallelStrategy\n"
        "    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false, "
        "process_group_backend: gloo}\n"
    )
    configs = ["--config", "configs/vision/smoke/nora_plus_plus.yaml", "--config", str(recipe)]
    save = [
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
    ]
    run([sys.executable, "-m", "vision", "fit", *configs, *save])
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1
