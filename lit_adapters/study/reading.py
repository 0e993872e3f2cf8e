"""Read a study from its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, shown
from lit_adapters.study.checks import check_study
from lit_adapters.study.document import check_shape, read_yaml
from lit_adapters.study.settings import Arm, AtEqual, Metric, NoiseFloor, Repeat, Running, Search, Study

# The classes of sections, wherever they stand.
_SECTIONS: dict[str, type] = {
    "metric": Metric,
    "also": Metric,
    "at_equal": AtEqual,
    "by": Metric,
    "read": Metric,
    "arms": Arm,
    "search": Search,
    "repeat": Repeat,
    "noise_floor": NoiseFloor,
    "run": Running,
}


def read_study(path: str | Path) -> Study:
    """Read the file of a study.

    Raises:
        AdapterError: The file is missing, is not YAML or has a key twice, names something unknown, or settings
            contradict each other.
    """
    path = Path(path)
    document = read_yaml(path, "does not exist; give the YAML file of a study")
    if not isinstance(document, dict):
        raise AdapterError(f"{path} holds {shown(document)}; a study has question, program, recipe, metric, arms, ...")
    check_shape(document, Study, _SECTIONS, path)
    document["arms"] = {key: arm or {} for key, arm in document.get("arms", {}).items()}
    study = _parse(document, path)
    check_study(study)
    return study


def _parse(document: Mapping[str, Any], path: Path) -> Study:
    """Let jsonargparse check names and types."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study", skip={"path"})
    try:
        parsed = parser.instantiate(parser.parse_object({"study": {**document}}))
    except (ArgumentError, ValueError, TypeError) as error:
        raise AdapterError(f"{path}: {one_line(error)}") from error
    study: Study = parsed.study
    titled = {key: _with(arm, title=arm.title or key) for key, arm in study.arms.items()}
    return _with(study, arms=titled, path=path)


def _with(instance: Any, **changes: Any) -> Any:
    values = {f.name: getattr(instance, f.name) for f in fields(instance)}
    return type(instance)(**{**values, **changes})
