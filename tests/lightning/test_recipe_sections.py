"""Empty, misspelt and wrongly typed sections of a recipe are named, where jsonargparse would drop them."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch import Trainer

import lit_adapters as la
from configs.generate import CONFIGS
from lit_adapters.lightning.recipe_sections import check_sections, recipes
from vision import CIFARDataModule, ViTClassifier
from vision.__main__ import main

KNOWN = {"model", "data", "trainer", "optimizer", "lr_scheduler", "lr_scale", "seed_everything", "ckpt_path", "config"}
CLASSES = {"model": ViTClassifier, "data": CIFARDataModule, "trainer": Trainer}
ADAMW = {"class_path": "torch.optim.AdamW"}


def check(document):
    check_sections(document, KNOWN, CLASSES, "x.yaml")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"modle": {}}, "section 'modle' is unknown; did you mean 'model'"),
        ({"modle": None}, "section 'modle' is unknown"),
        ({"zzz": []}, "section 'zzz' is unknown: use ckpt_path, config, data"),
        ({"model": []}, r"section 'model' is \[\], and must hold values by name"),
        ({"model": 3}, "section 'model' is 3"),
        ({"model": None}, "section 'model' is None"),
        ({"data": None}, "section 'data' is None"),
        ({"trainer": []}, r"section 'trainer' is \[\]"),
        ({"trainer": True}, "section 'trainer' is True"),
        ({"optimizer": {}}, "section 'optimizer' is empty"),
        ({"lr_scheduler": {}}, "section 'lr_scheduler' is empty"),
        ({"model": {"adaptres": {}}}, "model.adaptres is unknown; did you mean 'adapters'"),
        ({"model": {"adapters": {}}}, "model.adapters is empty"),
        ({"model": {"adapters": [{}]}}, "model.adapters has an empty entry"),
        ({"model": {"num_classes": {}}}, "model.num_classes is empty"),
        ({"trainer": {"calbacks": {}}}, "trainer.calbacks is unknown; did you mean 'callbacks'"),
        ({"trainer": {"callbacks": {}}}, "trainer.callbacks is empty"),
        ({"trainer": {"callbacks": [{}]}}, "trainer.callbacks has an empty entry"),
        ({"trainer": {"logger": {}}}, "trainer.logger is empty"),
        ({"optimizer": {**ADAMW, "init_args": {"bettas": {}}}}, "optimizer.init_args.bettas is unknown"),
        (
            {"model": {"adapters": [{"class_path": "lit_adapters.LoRA", "init_args": {"rnak": {}}}]}},
            r"model.adapters\[0\].init_args.rnak is unknown; did you mean 'rank'",
        ),
    ],
)
def test_refused(document, message):
    with pytest.raises(la.AdapterError, match=message):
        check(document)


@pytest.mark.parametrize(
    "document",
    [
        None,
        "text",
        {},
        {"model": {}, "data": {}, "trainer": {}},
        {"trainer": None},
        {"lr_scale": {}, "seed_everything": None},
        {"model": "model.yaml"},
        {"model": {"adapters": [], "train": []}},
        {"model": {"adapters": {"class_path": "lit_adapters.LoRA", "init_args": {}}}},
        {"model": {"adapters": {"class_path": "lit_adapters.LoRA", "init_args": {"rank_pattern": {}}}}},
        {"optimizer": {**ADAMW, "init_args": {}}},
    ],
)
def test_accepted(document):
    check(document)


@pytest.mark.parametrize("path", sorted((CONFIGS / "vision").rglob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes(path):
    check(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_where_recipes_come_from(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {}\n")
    (tmp_path / "torn.yaml").write_text("model: {")
    a, torn = str(tmp_path / "a.yaml"), str(tmp_path / "torn.yaml")
    found = list(recipes(["fit", "--config", a, f"-c={a}", f"--config={torn}", "--config=nowhere.yaml", "--config"]))
    assert found == [(a, {"model": {}})] * 2


@pytest.mark.parametrize(("line", "message"), [("modle: {}", "'modle' is unknown"), ("seed_everything: -1", "-1 must")])
def test_the_command_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr("sys.argv", ["program"])
    (tmp_path / "x.yaml").write_text(f"{line}\n")
    with pytest.raises(la.AdapterError, match=message):
        main([f"--config={tmp_path}/x.yaml"], run=False)
