"""Edited recipes of every command: each parses and builds, or is refused with an error of ours."""

import importlib
import json

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from configs.generate import CONFIGS
from lit_adapters.errors import AdapterError
from tests.mutations import json_edits
from tests.tiers import fast_only

# The module of a command, and the recipe that is edited.
COMMANDS = {
    "vision": ("vision.__main__", "vision/smoke/nora_plus_plus"),
    "language": ("language.__main__", "language/smoke/afa"),
    "dpo": ("language.dpo.__main__", "language/smoke/dpo"),
    "grpo": ("language.grpo.__main__", "language/smoke/grpo"),
    "draft": ("language.draft.__main__", "language/smoke/draft"),
}


def tracebacks(command, count, seed, tmp_path):
    """What ends neither in a run that could begin nor in an error of ours, for so many edits of a recipe."""
    module, recipe = COMMANDS[command]
    main = importlib.import_module(module).main
    document = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))
    file, found, refused = tmp_path / "recipe.yaml", [], 0
    for edit, edited in json_edits(document, count, seed):
        file.write_text(json.dumps(edited), encoding="utf-8")  # JSON is YAML
        try:
            main(["--config", str(file)], run=False)
        except (AdapterError, MisconfigurationException) as error:
            refused += 1
            if not 10 < len(str(error)) < 3000:
                found.append(f"{edit}: a message of {len(str(error))} characters")
        except Exception as error:  # whatever else comes is a traceback for the user
            found.append(f"{edit}: {error!r:.200}")
    assert refused > count // 3
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", fast_only(["vision", "language"], COMMANDS))
def test_edited_recipes(command, tmp_path):
    assert tracebacks(command, 12, 0, tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_many_edited_recipes(command, tmp_path):
    assert tracebacks(command, 150, 1, tmp_path) == []
