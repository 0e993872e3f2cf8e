"""Tensors of a checkpoint that are no plain ones of their own: one error, before they are copied."""

from pathlib import Path

import pytest
import torch

import lit_adapters as la
from language.module import CausalLMTuner
from lit_adapters.files.checkpoint_schema import check_checkpoint
from lit_adapters.files.saved import read_saved
from lit_adapters.learned import summary

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "sft.ckpt"
KEY = "model.model.layers.0.self_attn.v_proj.lora_A"


@pytest.fixture
def content():
    return torch.load(CHECKPOINT, weights_only=True)


def described(path):
    saved = read_saved(path)
    return summary.report(saved, summary.summarise(saved))


def views():
    """Tensors of a few bytes in the file that take up to terabytes where they are copied."""
    one = torch.zeros(1)
    yield "long", one.expand(1 << 40)
    yield "many rows", torch.zeros(1, 8).expand(1 << 30, 8)
    yield "overlapping", torch.zeros(1 << 13).as_strided((1 << 12, 1 << 13), (1, 0))


@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", "callbacks", "lit_adapters", "a user's own"])
def test_views_that_would_fill_the_memory(content, place):
    for name, view in views():
        if place == "state_dict":
            edited = content["state_dict"] | {KEY: view}
        else:
            edited = {"optimizer_states": [{"state": {0: {"exp_avg": view}}, "param_groups": []}]}.get(
                place, {"x": view}
            )
        with pytest.raises(la.AdapterError, match=f"{place}.* must be a tensor whose values are all in the file"):
            check_checkpoint(content | {place: edited}, name)


def test_small_views_are_buffers(content):
    check_checkpoint(content | {"state_dict": {"positions": torch.arange(9).expand(4, 9)}}, "x.ckpt")


PROGRESS = {"total": {"ready": 1}, "current": {"ready": 1}}


@pytest.mark.parametrize(
    "edit",
    [
        lambda loops: {},
        lambda loops: {"fit_loop": loops["fit_loop"]},
        lambda loops: loops | {"test_loop": 3},
        lambda loops: loops | {"test_loop": {"batch_progress": 3}},
        lambda loops: loops | {"test_loop": {"batch_progress": {"total": {}}}},
        lambda loops: loops | {"predict_loop": {"batch_progress": PROGRESS | {"total": {"ready": "x"}}}},
        lambda loops: loops | {"fit_loop": {"epoch_loop.batch_progress": PROGRESS | {"current": [1]}}},
    ],
)
def test_loops_that_evaluate(content, edit):
    """Lightning loads them for `test` too, where no callback may look at them first."""
    check_checkpoint(content, "x.ckpt")
    with pytest.raises(la.AdapterError, match=r"'loops' in the checkpoint is .*, and must be"):
        check_checkpoint(content | {"loops": edit(content["loops"])}, "x.ckpt")


def test_values_nested_in_each_other(content):
    deep = []
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(la.AdapterError, match="nested at most"):
        check_checkpoint(content | {"own": deep}, "x.ckpt")


STRANGE = {
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "NaN": lambda t: t * float("nan"),
    "inf": lambda t: t + float("inf"),
    "wide": lambda t: t[:1].expand(1 << 30, t.shape[1]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_tensors_of_an_adapter(content, kind, tmp_path):
    content["state_dict"][KEY] = STRANGE[kind](content["state_dict"][KEY])
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(la.AdapterError):
        described(tmp_path / "x.ckpt")


def test_a_parameter_is_as_good_as_its_values(content, tmp_path):
    state = content["state_dict"]
    content["state_dict"] = {k: torch.nn.Parameter(t) if t.is_floating_point() else t for k, t in state.items()}
    torch.save(content, tmp_path / "x.ckpt")
    assert described(tmp_path / "x.ckpt") == described(CHECKPOINT).replace(str(CHECKPOINT), str(tmp_path / "x.ckpt"))


def test_a_message_does_not_list_all_tensors(content, tmp_path):
    torch.save(content | {"state_dict": {"x" * 10_000: torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(la.AdapterError, match="do not fit this CausalLMTuner") as error:
        CausalLMTuner.load_from_checkpoint(tmp_path / "x.ckpt")
    assert len(str(error.value)) < 1000
