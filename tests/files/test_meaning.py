"""The meaning of a model's inputs and outputs travels with its weights, and contradictions are errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lit_adapters as la
from lit_adapters import AdapterError
from lit_adapters.cli.commands import main
from lit_adapters.files.adapters import HEADER
from lit_adapters.files.meaning import (
    CHECKPOINT_KEY,
    MEANING_FILE,
    adopt_meaning,
    is_of_the_base,
    meaning_of,
    read_meaning,
    restore_meanings,
    save_meanings,
    set_meaning,
)
from tests.mutations import json_edits

MEANING = {
    "classes": ["bee", "cat"],
    "image_size": 8,
    "mean": [0.5, 0.4, 0.3],
    "prompt": {"before": "Q: ", "end": None},
}


def base(meaning=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2))
    if meaning:
        set_meaning(model, meaning)
    return model


def adapted(meaning=None) -> nn.Sequential:
    model = base(meaning)
    la.attach(model, la.LoRA(rank=2, targets=["0"]), train=["2"])
    return model


def test_a_directory_carries_it(tmp_path):
    la.save_adapters(adapted(MEANING), tmp_path)
    assert json.loads((tmp_path / HEADER).read_text())["meaning"] == MEANING
    loaded = base({"image_size": 8, "colour": "RGB"})
    la.load_adapters(loaded, tmp_path)
    assert meaning_of(loaded) == MEANING | {"colour": "RGB"}
    la.merge(loaded)
    assert meaning_of(copy.deepcopy(loaded)) == MEANING | {"colour": "RGB"}


def test_a_directory_that_contradicts_the_model_is_refused_before_it_is_attached(tmp_path):
    la.save_adapters(adapted(MEANING), tmp_path)
    loaded = base({"classes": ["cat", "bee"]})
    with pytest.raises(AdapterError, match=r"classes \['bee', 'cat'\], but \['cat', 'bee'\] is asked for"):
        la.load_adapters(loaded, tmp_path)
    assert not list(la.adapters(loaded))
    assert meaning_of(loaded) == {"classes": ["cat", "bee"]}


def test_the_meaning_of_the_base_gives_way_to_that_of_a_file(tmp_path):
    """A model that goes on training from merged weights may learn something else."""
    la.save_adapters(adapted(MEANING), tmp_path)
    loaded = base()
    set_meaning(loaded, {"classes": ["cat", "bee"], "colour": "RGB"}, of_the_base=True)
    assert is_of_the_base(loaded)
    la.load_adapters(loaded, tmp_path)
    assert meaning_of(loaded) == MEANING
    assert not is_of_the_base(loaded)
    module = nn.ModuleDict({"student": adapted(MEANING)})
    checkpoint: dict = {}
    save_meanings(checkpoint, module)
    fresh = nn.ModuleDict({"student": adapted()})
    set_meaning(fresh["student"], {"image_size": 16}, of_the_base=True)
    restore_meanings(checkpoint, fresh)
    assert meaning_of(fresh["student"]) == MEANING


def test_nothing_is_written_where_nothing_was_said(tmp_path):
    la.save_adapters(adapted(), tmp_path)
    assert "meaning" not in json.loads((tmp_path / HEADER).read_text())
    checkpoint: dict = {}
    save_meanings(checkpoint, adapted())
    assert checkpoint == {}


def test_a_checkpoint_carries_it():
    module = nn.ModuleDict({"student": adapted(MEANING), "teacher": adapted()})
    checkpoint: dict = {}
    save_meanings(checkpoint, module)
    fresh = nn.ModuleDict({"student": adapted(), "teacher": adapted()})
    restore_meanings(checkpoint, fresh)
    assert meaning_of(fresh["student"]) == MEANING
    assert meaning_of(fresh["teacher"]) == {}
    with pytest.raises(AdapterError, match=r"last\.ckpt gives the meaning of 'student', which the module has not"):
        restore_meanings(checkpoint, adapted(), "last.ckpt")
    with pytest.raises(AdapterError, match=r"last\.ckpt was trained with image_size 8, but 16 is asked for"):
        restore_meanings(checkpoint, nn.ModuleDict({"student": adapted({"image_size": 16})}), "last.ckpt")


def test_merged_weights_carry_it(tmp_path, capsys):
    la.save_adapters(adapted(MEANING), tmp_path / "adapter")
    main(
        ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--base", "tests.files.test_meaning.base"]
    )
    assert read_meaning(tmp_path / "out") == MEANING
    assert read_meaning(tmp_path) == {}
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad", [None, [], "text", {1: 2}, {"a": float("nan")}, {"a": {1, 2}}, {"a": "\ud83d"}, {"a": "x" * (1 << 21)}]
)
def test_what_is_not_plain_is_refused(bad):
    model = base()
    with pytest.raises(AdapterError, match=r"set_meaning: the meaning (must hold plain JSON values|takes 2,)"):
        set_meaning(model, bad)
    assert meaning_of(model) == {}


def test_damaged_meanings_end_in_one_error_or_are_plain(tmp_path):
    """60 edits each of the entry of a checkpoint and of meaning.json; the model stays as it was after an error."""
    for what, edited in json_edits({CHECKPOINT_KEY: {"": MEANING}}, 60):
        model = base({"image_size": 8})
        try:
            restore_meanings(edited if isinstance(edited, dict) else {CHECKPOINT_KEY: edited}, model)
        except AdapterError:
            assert meaning_of(model) == {"image_size": 8}, what
        else:
            assert meaning_of(model)["image_size"] == 8, what
    for what, edited in json_edits(MEANING, 60, seed=1):
        (tmp_path / MEANING_FILE).write_text(json.dumps(edited))
        model = base()
        try:
            adopt_meaning(model, read_meaning(tmp_path), MEANING_FILE)
        except AdapterError:
            assert meaning_of(model) == {}, what
        else:
            assert meaning_of(model) == json.loads(json.dumps(edited)), what
    (tmp_path / MEANING_FILE).write_text("[" * 100_000)
    with pytest.raises(AdapterError, match=r"meaning\.json is damaged"):
        read_meaning(tmp_path)
