"""The benchmarks start, keep their runs, and the pages show what their result files hold."""

from __future__ import annotations

import importlib
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import study_tables, tables
from benchmarks.arms import ARMS, STEPS
from benchmarks.bounds import Bound
from lit_adapters.study.report.summary import summarise
from tests.study.synthetic import finished, synthetic_study

ROOT = Path(__file__).parents[1]
SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "argparse" in path.read_text()]
SCRIPTS += ["gpu.__main__"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_starts(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "options:" in capsys.readouterr().out


def test_the_pages_hold_the_tables_of_the_result_files(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    pages = [ROOT / "README.md", ROOT / tables.ALL_TABLES, *(ROOT / "docs").glob("*.md")]
    for page in pages:
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main()
    for page in pages:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text(), "run python -m benchmarks.tables"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], "not run"),
        ([0.9, 1.004], "a 0.90; b 1.00"),
        ([1.2, 0.9], "**a 1.20**; b 0.90"),
        ([0.1, 0.5, 0.2, 0.3, 0.4], "largest of 5: b 0.50"),
        ([0.1, 1.5, 0.2, 1.3, 0.4], "missed of 5: **b 1.50**; **d 1.30**"),
    ],
)
def test_the_row_of_a_bound_shows_what_misses_it(values, shown):
    measured = [(name, value, f"{value:.2f}") for name, value in zip("abcde", values, strict=False)]
    assert Bound("quantity", 1.0, measured).row() == ["quantity", "1.00", shown]


@pytest.mark.parametrize("table", STEPS.values())
def test_the_rows_of_a_table_have_places_of_their_own(table):
    places = [arm.rows[table].place for arm in ARMS.values() if table in arm.rows]
    assert len(set(places)) == len(places) > 0


def test_pages_show_what_a_study_has_measured(tmp_path, monkeypatch):
    arms = {"a": "Alpha", "b": "Beta", "c": "Gamma"}
    study = synthetic_study(tmp_path, arms, contrasts=[("a", "b")], margin=9.0)
    study.arms["c"] = replace(study.arms["c"], exploratory=True)
    results = finished(study, {"a": 61.2, "b": 60, "c": 58}, spread=0.3)
    monkeypatch.setattr(study_tables, "_results", lambda name: results)
    monkeypatch.setattr(study_tables, "_summary", cache(lambda name: summarise(study, results)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- study s front -->\n<!-- /study -->\n")
    page = tmp_path / "docs" / "claims.md"
    blocks = ("contrasts a-b a-c", "contrasts a-b of test/loss", "arms", "detectable a-b b-c")
    page.write_text("".join(f"before\n<!-- study s {block} -->\nold\n<!-- /study -->\n" for block in blocks))
    study_tables.fill(tmp_path)
    study_tables.fill(tmp_path)
    c = summarise(study, results).contrasts[0].comparison
    lines = page.read_text().splitlines()
    assert lines[2].startswith(f"- Alpha minus Beta: **{c.difference:+.2f} points** (95% interval {c.low:+.2f} to ")
    assert lines[2].endswith("after Holm, equivalent within 9 points)")
    assert re.fullmatch(
        r"- Alpha minus Gamma: \*\*\+\d\.\d points\*\* \(.* n = 4 training sets, exploratory\)", lines[3]
    )
    assert re.fullmatch(r"- Alpha minus Beta: \*\*-0\.\d+\*\* \(.*, exploratory\)", lines[7])
    assert [line[:5] for line in lines[11:16]] == ["| arm", "|---|", "| **A", "| Bet", "| Gam"]
    sizes = re.fullmatch(r"The smallest .* from (\d\S*) points \((\w+)\) to (\d\S*) points \((\w+)\)\.", lines[-2])
    assert sizes
    assert float(sizes[1]) < float(sizes[3])
    assert {sizes[2], sizes[4]} == {"Alpha", "Beta"}
    assert (tmp_path / "docs" / "s-front.png").stat().st_size > 5000
    assert "](docs/s-front.png)" in (tmp_path / "README.md").read_text()
    page.write_text("<!-- study s noise -->\nold\n<!-- /study -->\n")
    study_tables.fill(tmp_path)
    assert page.read_text().splitlines()[1] == ""  # this study has no noise floor
    page.write_text("<!-- study s contrasts a-d -->\n<!-- /study -->\n")
    with pytest.raises(SystemExit, match="s has the arms a, b, c"):
        study_tables.fill(tmp_path)
    unclosed = "<!-- study s arms -->\ntext to keep\n<!-- study s arms -->\n<!-- /study -->\n"
    page.write_text(unclosed)
    with pytest.raises(SystemExit, match="has no <!-- /study --> at its end"):
        study_tables.fill(tmp_path)
    assert page.read_text() == unclosed


def test_a_picture_shows_the_arms_of_two_studies(tmp_path, monkeypatch):
    studies = {"s": {"a": "Alpha", "b": "Beta"}, "t": {"b": "Beta again", "c": "Gamma"}}
    summaries, shown = {}, []
    for name, arms in studies.items():
        study = synthetic_study(tmp_path, arms)
        summaries[name] = summarise(study, finished(study, dict.fromkeys(arms, 60)))
    summaries["u"] = replace(summaries["t"], study=replace(summaries["t"].study, set={"data.few_shot": 7}))
    monkeypatch.setattr(study_tables, "_summary", summaries.__getitem__)
    monkeypatch.setattr(study_tables, "front_figure", lambda summary, width: shown.append(summary.arms) or Figure())
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- study s front t -->\n<!-- /study -->\n")
    study_tables.fill(tmp_path)
    assert {arm.title for arm in shown[0].values()} == {"Alpha", "Beta", "Gamma"}
    page.write_text("<!-- study s front u -->\n<!-- /study -->\n")
    with pytest.raises(SystemExit, match="s and u differ in set, so no picture shows both"):
        study_tables.fill(tmp_path)


def test_a_page_says_that_a_run_diverged(tmp_path, monkeypatch):
    study = synthetic_study(tmp_path, {"a": "Alpha", "b": "Beta"}, contrasts=[("a", "b")])
    results = finished(study, {"a": 61, "b": 60}, diverged=[("b", 1)])
    monkeypatch.setattr(study_tables, "_summary", lambda name: summarise(study, results))
    page = tmp_path / "README.md"
    page.write_text("<!-- study s contrasts a-b -->\n<!-- /study -->\n")
    study_tables.fill(tmp_path)
    assert "- Alpha minus Beta: a run diverged\n" in page.read_text()


def test_a_page_shows_chosen_metrics_at_equal_accuracy(tmp_path):
    page = tmp_path / "README.md"
    begin = "<!-- study vision_features equal nora-lora of val/feature_change -->\n"
    page.write_text(f"{begin}<!-- /study -->\n")
    study_tables.fill(tmp_path)
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert table[0] == "| first minus second | accuracy, points | size of the change (lower is better) |"
    assert table[2].startswith("| NoRA, G = 8 minus LoRA, r = 8 | ")
    page.write_text(begin.replace("feature_change", "colour") + "<!-- /study -->\n")
    with pytest.raises(SystemExit, match=r"compares at equal val/loss, .*, not \['val/colour'\]"):
        study_tables.fill(tmp_path)
