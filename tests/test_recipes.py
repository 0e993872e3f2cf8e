"""The recipes in configs/ are what configs/source says."""

from __future__ import annotations

import pytest
import yaml

from configs.generate import CONFIGS, SOURCE, fill, recipes


def test_the_committed_recipes_are_the_generated_ones():
    generated = {f"{path}.yaml": text for path, text in recipes().items()}
    by_hand = {SOURCE, CONFIGS / "studies"}
    paths = [path for path in CONFIGS.rglob("*.yaml") if by_hand.isdisjoint(path.parents)]
    assert {str(path.relative_to(CONFIGS)): path.read_text(encoding="utf-8") for path in paths} == generated, (
        "run python -m configs.generate; delete files that configs/source no longer names"
    )


def test_each_recipe_begins_with_its_launch_command():
    for path, text in recipes().items():
        commands = [line for line in text.splitlines() if line.startswith("#   python -m ")]
        assert f" fit --config configs/{path}.yaml" in commands[0]


def test_the_head_of_every_vision_recipe_has_a_rate_near_a_hundredth():
    for path, text in recipes().items():
        if path.startswith("vision/"):
            recipe = yaml.safe_load(text)
            rate = recipe["optimizer"]["init_args"]["lr"] * recipe.get("lr_scale", {}).get("head", 1.0)
            assert 8e-3 <= rate <= 2e-2, path


def test_a_value_of_several_lines_repeats_what_stands_before_it():
    names = {"notes": "one\ntwo", "none": "", "model": "name: $name\nrank: 8", "name": "vit"}
    text = "# $notes\n# $none\nmodel:\n  $model\nlog: runs-$name\n"
    assert fill(text, names) == "# one\n# two\nmodel:\n  name: vit\n  rank: 8\nlog: runs-vit\n"


def test_a_hole_without_a_value_is_an_error():
    with pytest.raises(ValueError, match=r"value for \$rank in the line '  rank: \$rank'"):
        fill("model:\n  rank: $rank\n", {})
