"""The report of a study: its sentences follow from the numbers, nothing is dropped, and both pages say the same."""

import html
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from lit_adapters.errors import AdapterError
from lit_adapters.study.protocol import protocol_of
from lit_adapters.study.records import Results
from lit_adapters.study.report.content import study_page
from lit_adapters.study.report.digits import count, decimals, duration, enumeration, number, probability, rate
from lit_adapters.study.report.front import front_figure
from lit_adapters.study.report.html import html_page
from lit_adapters.study.report.markdown import markdown_page
from lit_adapters.study.report.page import write_report
from lit_adapters.study.report.sentences import answer
from lit_adapters.study.report.summary import summarise
from lit_adapters.study.settings import Arm, AtEqual, Metric, NoiseFloor, Repeat, Search
from tests.study.synthetic import LOSS, changed, finished, searched, synthetic_study

ROOT = Path(__file__).parents[2]
ARMS = {"a": "Alpha", "b": "Beta"}


def plain(text):
    return text if isinstance(text, str) else "".join(text)


def sentences(study, results):
    return [plain(sentence) for sentence in answer(summarise(study, results))]


def page_text(study, results):
    return markdown_page(study_page(summarise(study, results)))


def two_arms(folder, difference, spread=0.3, **changes):
    study = synthetic_study(folder, ARMS, **{"contrasts": [("a", "b")], **changes})
    results = finished(study, {"a": 60 + difference, "b": 60}, spread=spread)
    return study, results


@pytest.mark.parametrize(("difference", "side"), [(5, "above"), (-5, "below")])
def test_a_difference_is_said_with_its_side_and_interval(tmp_path, difference, side):
    study, results = two_arms(tmp_path, difference)
    (sentence,) = sentences(study, results)
    c = summarise(study, results).contrasts[0].comparison
    size = f"{abs(c.difference):.1f}"
    assert sentence.startswith(f"Alpha is {size} points {side} Beta (95% interval {c.low:.1f} to {c.high:.1f}, n = 4 ")
    assert "after Holm" in sentence


@pytest.mark.parametrize(
    ("difference", "words"), [(-5, "below Beta, which is better"), (5, "above Beta, which is worse")]
)
def test_where_lower_is_better_the_sentence_says_which_side_is(tmp_path, difference, words):
    loss = Metric("test/perplexity", "lower", unit="nats")
    study, results = two_arms(tmp_path, difference, metric=loss)
    assert words in sentences(study, results)[0]
    assert ("**better**" in page_text(study, results)) == (difference < 0)


def test_a_difference_that_was_not_seen_has_the_size_that_would_have_been(tmp_path):
    study, results = two_arms(tmp_path, 0.3, spread=1.5)
    (sentence,) = sentences(study, results)
    c = summarise(study, results).contrasts[0].comparison
    assert sentence.startswith("No difference was seen between Alpha and Beta")
    assert f"one of {c.detectable:.1f} points would have been seen by one test with 80% power" in sentence


@pytest.mark.parametrize("margin", [1.0, 2.5])
def test_equivalence_names_the_margin(tmp_path, margin):
    study, results = two_arms(tmp_path, 0.0, spread=0.15, margin=margin)
    unit = "point" if margin == 1 else "points"
    assert sentences(study, results)[0].startswith(f"Alpha and Beta are equivalent within {margin:g} {unit} (")


def test_intervals_without_test_items_are_named(tmp_path):
    study, results = two_arms(tmp_path, 5)
    assert "hold for these very test items" not in page_text(study, results)
    loss = Metric("test/loss", "lower", title="test loss")
    text = page_text(replace(study, also=[loss]), results)
    assert "The intervals of test loss hold for these very test items, those of other metrics for new ones." in text


def test_a_difference_that_only_holm_takes_away_is_unclear(tmp_path):
    arms = {name: name.upper() for name in "abcd"}
    study = synthetic_study(tmp_path, arms, contrasts=[("a", other) for other in "bcd"])
    results = finished(study, {**dict.fromkeys(arms, 60.0), "b": 57.5}, spread=0.9, seed=3)
    contrast, *_ = summarise(study, results).contrasts
    assert contrast.comparison.p < 0.05 < contrast.comparison.p_holm
    assert contrast.verdict() == "unclear"
    assert sentences(study, results)[0].startswith("Unclear whether A and B differ")


def test_more_contrasts_than_sentences_share_them(tmp_path):
    arms = {name: name.upper() for name in "abcdefg"}
    study = synthetic_study(tmp_path, arms, contrasts=[("a", other) for other in "bcdefg"], margin=1.0)
    results = finished(
        study, {**dict.fromkeys(arms, 60.0), "b": 50.0, "c": 52.0}, spread=0.1, missing={("g", s) for s in range(4)}
    )
    said = sentences(study, results)
    assert len(said) <= 5
    assert said[0].startswith("A is 10.00 points above B (")
    assert said[1].startswith("A is 7.89 points above C (")
    assert said[2] == "Equivalent within 1 point: A and D; A and E; A and F."
    assert said[3].startswith("A and G cannot be compared yet: A has 4 of 4 final runs and G has 0 of 4")


def test_an_unfinished_study_says_so_and_compares_what_both_arms_have(tmp_path):
    study = synthetic_study(tmp_path, {**ARMS, "c": "Gamma"}, contrasts=[("a", "b")])
    gone = {("a", 3), *(("c", s) for s in range(4))}
    results = finished(study, {"a": 65, "b": 60, "c": 50}, missing=gone)
    text = page_text(study, results)
    assert "**Unfinished:** 7 of 12 final runs" in text
    assert "n = 3 of 4 training sets" in sentences(study, results)[0]
    assert "**Not run yet** (0 of 4 final runs): Gamma." in text
    assert re.search(r"\| Alpha \|.*\| 3 of 4 \|", text.replace("*", ""))


@pytest.mark.parametrize("runs", ["none", "searches"])
def test_a_study_without_final_runs_has_a_report(tmp_path, runs):
    study = synthetic_study(tmp_path, ARMS, contrasts=[("a", "b")])
    results = Results() if runs == "none" else searched(study, Results())
    assert sentences(study, results) == ["No final run has finished yet (0 of 8)."]
    assert ("Learning rates tried" in page_text(study, results)) == (runs == "searches")


def test_one_training_set_has_no_interval_and_no_test(tmp_path):
    study = synthetic_study(tmp_path, ARMS, contrasts=[("a", "b")])
    results = finished(study, {"a": 65, "b": 60}, missing={(arm, s) for arm in ARMS for s in (1, 2, 3)})
    (sentence,) = sentences(study, results)
    assert sentence.endswith("points above Beta on one training set: with n = 1 there is no interval and no test.")
    assert "nan" not in page_text(study, results).replace("contrasts", "")


def test_several_seeds_of_one_training_set_are_paired_and_called_so(tmp_path):
    repeat = Repeat([0], [], [0, 1, 2, 3], ["seed_everything"])
    study, results = two_arms(tmp_path, 5, repeat=repeat)
    assert "n = 4 seeds" in sentences(study, results)[0]
    assert "There is one training set" in page_text(study, results)


def test_seeds_of_a_training_set_count_once(tmp_path):
    repeat = Repeat([0, 1, 2], ["data.subset_index"], [0, 1], ["seed_everything"])
    study, results = two_arms(tmp_path, 5, repeat=repeat)
    summary = summarise(study, results)
    values = [r.metrics["test/acc1"] * 100 for r in summary.arms["a"].finals.values()]
    assert summary.contrasts[0].comparison.n == 3
    assert summary.arms["a"].estimates["test/acc1"].mean == pytest.approx(sum(values) / 6)


def test_an_arm_with_a_diverged_run_has_no_mean(tmp_path):
    study = synthetic_study(tmp_path, ARMS, contrasts=[("a", "b")])
    results = finished(study, {"a": 65, "b": 60}, diverged={("b", 2)})
    text = page_text(study, results)
    assert sentences(study, results) == ["Alpha and Beta cannot be compared: 1 of 4 final runs of Beta diverged."]
    assert summarise(study, results).arms["b"].estimates == {}
    assert "**Beta**: 1 of 4 final runs diverged (set 2, seed 0: loss is nan at step 30), so it has no mean." in text
    assert re.search(r"\| Beta \| 3\.6k \| diverged \| - \|", text)


def test_an_arm_of_which_every_rate_diverged_is_said(tmp_path):
    search = Search(Metric("val/loss", "lower"), [1e-3, 3e-3, 1e-2], extensions=0, sets=[100])
    study = synthetic_study(tmp_path, ARMS, contrasts=[("a", "b")], search=search)
    whole = finished(study, {"a": 65, "b": 60})
    results = Results()
    for record in whole.records:
        bad = record.arm == "b"
        if not bad or record.stage == "search":
            results.add(replace(record, status="diverged", metrics={}) if bad else record, whole.items(record))
    text = page_text(study, results)
    assert "every rate from 0.001 to 0.01 diverged" in text
    assert "all diverged" in text


def test_a_rate_at_the_edge_is_said(tmp_path):
    study = synthetic_study(tmp_path, ARMS)
    results = searched(study, Results(), edge={"b"})
    text = page_text(study, results)
    assert "**Beta**: the best rate of b is the highest one tried" in text
    assert "Every chosen rate" not in text
    assert "Every chosen rate lies inside" in page_text(study, searched(study, Results()))


def test_the_front_is_what_no_smaller_arm_beats(tmp_path):
    arms = {"head": "head", "good": "good", "bad": "bad", "large": "large"}
    study = synthetic_study(tmp_path, arms)
    sizes = {"head": 0, "good": 900, "bad": 900, "large": 10**6}
    results = finished(study, {"head": 50, "good": 60, "bad": 55, "large": 59}, parameters=sizes)
    assert [arm.key for arm in summarise(study, results).front()] == ["head", "good"]
    lower = replace(study, metric=LOSS, also=[])  # the loss falls where the accuracy rises
    assert [arm.key for arm in summarise(lower, results).front()] == ["head", "good"]


def test_arms_that_came_later_confirm_nothing(tmp_path):
    arms = {
        "a": "Alpha",
        "b": "Beta",
        "late": Arm("Late", {"model.name": "late"}, {"late": "search"}, exploratory=True),
    }
    study = synthetic_study(tmp_path, arms, contrasts=[("a", "b"), ("late", "b")])
    summary = summarise(study, finished(study, {"a": 65, "b": 60, "late": 70}))
    assert [(c.first.key, c.second.key) for c in summary.contrasts] == [("a", "b")]
    assert ("late", "b") in [(c.first.key, c.second.key) for c in summary.exploratory]
    assert summary.contrasts[0].comparison.p_holm == summary.contrasts[0].comparison.p


def test_the_noise_floor_stands_above_the_contrasts(tmp_path):
    study = synthetic_study(tmp_path, ARMS, contrasts=[("a", "b")], noise_floor=NoiseFloor("a", threads=2))
    results = finished(study, {"a": 65, "b": 60}, spread=0)
    for record in finished(study, {"a": 65.5, "b": 60}, spread=0, stage="noise").records:
        if (record.arm, record.stage) == ("a", "noise"):
            results.add(record)
    floor = summarise(study, results).noise_floor
    assert (floor.rms, floor.n) == (pytest.approx(0.5), 4)
    text = page_text(study, results)
    assert 0 < text.index("Noise floor:") < text.index("## Contrasts")
    equal = finished(study, {"a": 65, "b": 60}, spread=0)
    for record in finished(study, {"a": 65, "b": 60}, spread=0, stage="noise").records:
        if (record.arm, record.stage) == ("a", "noise"):
            equal.add(record)
    assert "4 pairs of runs of Alpha ended equal, so the change of noise\\_floor does not seem" in page_text(
        study, equal
    )


def test_items_that_do_not_make_the_metric_are_left_out(tmp_path):
    study, results = two_arms(tmp_path, 2)
    assert summarise(study, results).items
    other = Results()
    for record in results.records:
        other.add(record, {name: values * 0.9 for name, values in results.items(record).items()})
    assert not summarise(study, other).items
    assert "training sets, not that of test items" in page_text(study, other)


def test_runs_with_other_test_data_are_refused(tmp_path):
    study, results = two_arms(tmp_path, 2)
    record = next(r for r in results.records if r.stage == "final")
    results.add(record, {name: values[:-1] for name, values in results.items(record).items()})
    with pytest.raises(AdapterError, match=r"'correct' has 1999 test items in a-final-0"):
        summarise(study, results)


@pytest.mark.parametrize("width", [8.4, 3.7])
def test_labels_of_the_front_cover_neither_each_other_nor_points(tmp_path, width):
    arms = {f"arm{i}": f"LoRA, r = {i}, and more" for i in range(10)}
    study = synthetic_study(tmp_path, arms)
    sizes = {key: (70_000 + 900 * i, 400 * 5**i)[i % 2] for i, key in enumerate(arms)}
    means = {key: 60 + i % 3 for i, key in enumerate(arms)}
    figure = front_figure(summarise(study, finished(study, means, parameters=sizes)), width)
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(arms)
    assert not [1 for a, b in combinations(boxes, 2) if a.overlaps(b)]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    centres = axes.transData.transform([(line.get_xdata()[0], line.get_ydata()[0]) for line in points])
    assert not [1 for box in boxes for centre in centres if box.contains(*centre)]
    assert all(axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1) for box in boxes)


HOSTILE = '<script>alert("1")</script> | **x** [y](http://z) `c` $1'


def test_texts_of_files_are_escaped(tmp_path):
    study = synthetic_study(
        tmp_path, {"a": HOSTILE, "b": "Beta"}, question=HOSTILE, notes=[HOSTILE], contrasts=[("a", "b")]
    )
    page = study_page(summarise(study, finished(study, {"a": 65, "b": 60}, diverged={("a", 0)})))
    page.blocks = [block for block in page.blocks if not hasattr(block, "draw")]
    web, text = html_page(page), markdown_page(page)
    assert "<script" not in web
    assert html.escape(HOSTILE) in web
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[y\]|(?<!\\)`c", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert widths == {11, 7, 5, 6}  # contrasts, arms, costs of stages and of arms: no title adds a column


def test_the_report_is_complete_without_a_network(tmp_path):
    study, results = two_arms(tmp_path, 5)
    page = write_report(study, results, tmp_path / "out").read_text()
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "://" not in re.sub(r"data:[^\"]*", "", page)
    assert page.count("<img") == page.count("<source") == 4  # front, contrasts, rates, curves
    text = (tmp_path / "out" / "report.md").read_text()
    named = set(re.findall(r"\]\((\S+\.png)\)", text))
    assert named == {"front.png", "contrasts.png", "rates.png", "curves-train-loss.png"}
    assert named == {path.name for path in (tmp_path / "out").glob("*.png")}
    # Both pages have the same words.
    words = html.unescape(re.sub(r"<[^>]*>", " ", page.split("<main>")[1]))
    for sentence in re.findall(r"[A-Z][a-z ]{20,}\.", text):
        assert sentence in words


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count, 936, "936"),
        (count, 7680, "7.7k"),
        (count, 73728, "74k"),
        (count, 999_700, "1.0M"),
        (count, 21_536_640, "21.5M"),
        (probability, 0.0004, "< 0.001"),
        (probability, 0.0123, "= 0.012"),
        (probability, 0.0496, "= 0.0496"),
        (probability, 0.0501, "= 0.0501"),
        (probability, 0.4, "= 0.40"),
        (rate, 3e-5, "3e-5"),
        (rate, 1.5e-4, "1.5e-4"),
        (rate, 0.1, "0.1"),
        (duration, 40, "40 s"),
        (duration, 144, "2.4 min"),
        (duration, 7200, "2.0 h"),
        (enumeration, ["a", "b", "c"], "a, b and c"),
        (enumeration, ["a, r = 1", "b"], "a, r = 1 and b"),
        (decimals, [0.9], 1),
        (decimals, [0.12], 2),
        (decimals, [0.0028], 4),
        (decimals, [], 1),
        (lambda value: number(value, 1, sign=True), -0.04, "0.0"),
        (lambda value: number(value, 1, sign=True), 0.26, "+0.3"),
    ],
)
def test_numbers_have_the_digits_that_say_something(function, value, text):
    assert function(value) == text


def test_the_example_of_the_docs_is_the_smoke_study():
    example, _ = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    assert yaml.safe_load(example) == yaml.safe_load((ROOT / "configs" / "studies" / "smoke.yaml").read_text())


def test_a_change_after_the_first_final_run_stands_at_the_head(tmp_path):
    arms = {"a": "Alpha", "b": "Beta"}
    study = synthetic_study(tmp_path, arms, contrasts=[("a", "b")], margin=1.0)
    results = finished(study, {"a": 80, "b": 70})
    results = changed(results, lambda r: replace(r, protocol=protocol_of(study) if r.stage == "final" else {}))
    words = "Changed after the first final run"
    assert words not in page_text(study, results)
    later = replace(study, margin=3.0)
    assert f"**{words}:** the margin was 1 before" in page_text(later, results)


def test_runs_of_an_earlier_file_and_settings_of_one_stage_are_listed(tmp_path):
    study = synthetic_study(tmp_path, {"a": "Alpha", "b": "Beta"})
    results = finished(study, {"a": 80, "b": 70})
    text = page_text(replace(study, final={"trainer.max_epochs": 3}), results)
    assert "8 finished runs, 8 of them final, are of an earlier version of the study's file" in text
    assert 'Final runs alone have <code>{"trainer.max_epochs": 3}</code>' in html.unescape(text.replace("\\_", "_"))


def test_contrasts_are_read_where_both_were_equally_good(tmp_path):
    at = AtEqual(Metric("val/acc1", "higher", 100, "points", "accuracy"), [Metric("val/loss", "lower", title="loss")])
    study, results = two_arms(tmp_path, 5, at_equal=at)

    def curve(record):
        # Beta reaches 50%, where its loss is 2 + set / 10; Alpha passes 50% half-way between losses of 1.4 and 1.0.
        end = (0.6, 1.0) if record.arm == "a" else (0.5, 2 + record.set / 10)
        path = [(0.4, 1.4), end]
        return replace(record, curve=[{"step": 4 * i, "val/acc1": a, "val/loss": v} for i, (a, v) in enumerate(path)])

    equal = summarise(study, changed(results, curve)).contrasts[0].equal
    assert (equal.level.mean, equal.level.n, equal.failure) == (pytest.approx(50), 4, "")
    assert equal.differences["val/loss"].mean == pytest.approx(1.2 - 2.15)
    text = page_text(study, changed(results, curve))
    assert "The same contrasts at equal accuracy (exploratory" in text
    assert re.search(r"Alpha minus Beta \| 50\.0.* \| -0\.95 \(-1\.16 to -0\.74\) \|", text)


def test_what_has_no_equal_level_is_said(tmp_path):
    at = AtEqual(Metric("val/acc1", "higher"), [Metric("val/loss", "lower")])
    text = page_text(*two_arms(tmp_path, 5, at_equal=at))
    assert "Alpha minus Beta: set 0, seed 0: no point of the curve has both val/acc1 and val/loss" in text


def test_values_of_different_validations_are_not_shown_at_one_level(tmp_path):
    at = AtEqual(Metric("val/acc1", "higher"), [Metric("val/loss", "lower"), Metric("val/rank", "lower")])
    study, results = two_arms(tmp_path, 5, at_equal=at)
    both = {"val/acc1": 0.4, "val/loss": 1.4, "val/rank": 2.0}
    curve = [{"step": 4, **both}, {"step": 8, "val/acc1": 0.6, "val/loss": 1.0}]
    equal = summarise(study, changed(results, lambda r: replace(r, curve=curve))).contrasts[0].equal
    assert (equal.level, equal.differences) == (None, {})
    assert "val/loss and val/rank have no common level" in equal.failure
