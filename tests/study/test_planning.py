"""Which runs a study makes: what is searched, on which data, how far, and what counts as the same run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from lit_adapters.cli.study import status
from lit_adapters.errors import AdapterError
from lit_adapters.study.planning import AllDivergedError, Plan
from lit_adapters.study.protocol import changes, family_of
from lit_adapters.study.reading import read_study
from lit_adapters.study.records import Record, Results
from lit_adapters.study.running import run_study
from lit_adapters.study.settings import Search
from tests.study.studies import STUDY, finish, write_study

RATE = "optimizer.init_args.lr"
METRIC = {"name": "val/a", "better": "higher"}
GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def searched(folder, best, extensions=2, grid=GRID, **changes):
    """The study's plan and results after a search whose validation loss is least at the rate `best`."""
    search = {**STUDY["search"], "grid": grid, "extensions": extensions, **changes}
    plan, results = Plan(write_study(folder, search=search)), Results()
    runs = finish(plan, results, lambda run: {"val/loss": abs(math.log(run.rates[RATE] / best)), "test/loss": 1.0})
    return plan, results, runs


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (1e-3, GRID, False),
        (3e-5, [1e-5, 3e-5, *GRID], False),
        (3e-2, [*GRID, 3e-2, 1e-1], False),
        (1e-7, [1e-5, 3e-5, *GRID], True),  # two extensions are not enough, and the report says so
    ],
)
def test_the_grid_is_extended_until_the_best_rate_is_inside(tmp_path, best, tried, edge):
    plan, results, _ = searched(tmp_path, best)
    chosen = plan.chosen(results, "narrow")
    assert sorted(t.rates[RATE] for t in chosen.tried) == tried
    assert chosen.rates == {RATE: pytest.approx(max(best, 1e-5))}
    assert bool(chosen.edge) is edge
    assert chosen.runs == len(tried)


@pytest.mark.parametrize(
    ("rates", "up", "expected"), [([1, 3, 10], True, 30), ([1, 3], False, 1 / 3), ([2, 4, 8], True, 16)]
)
def test_a_grid_goes_on_in_its_own_steps(rates, up, expected):
    assert Search.next_rate(rates, up) == pytest.approx(expected, rel=1e-3)


def test_every_arm_has_the_same_first_grid_and_two_sets(tmp_path):
    arms = {name: {"rates": {RATE: "search"}, "set": {"model.width": width}} for width, name in enumerate("ab", 1)}
    study = write_study(tmp_path, arms=arms, contrasts=None, search={**STUDY["search"], "sets": [7, 8]})
    due = Plan(study).due(Results())
    assert {(run.arm, run.rates[RATE], run.set) for run in due} == {
        (arm, rate, number) for arm in "ab" for rate in (0.01, 0.1) for number in (7, 8)
    }


def test_a_rate_is_judged_by_its_mean_over_the_tuning_sets(tmp_path):
    plan, results = Plan(write_study(tmp_path, search={**STUDY["search"], "sets": [7, 8], "extensions": 0})), Results()
    losses = {(0.01, 7): 0.0, (0.01, 8): 3.0, (0.1, 7): 1.0, (0.1, 8): 1.0}
    finish(plan, results, lambda run: {"val/loss": losses.get((run.rates[RATE], run.set), 0.0)})
    assert plan.chosen(results, "narrow").rates == {RATE: 0.1}


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    plan, results = Plan(write_study(tmp_path, search={**STUDY["search"], "grid": GRID, "extensions": 0})), Results()
    finish(plan, results, lambda run: None if run.rates[RATE] > 5e-4 else {"val/loss": 1.0 - run.rates[RATE]})
    assert plan.chosen(results, "narrow").rates == {RATE: 3e-4}
    assert [t.mean for t in plan.chosen(results, "narrow").tried][2:] == [math.inf] * 3


def test_a_search_that_only_diverges_is_an_error(tmp_path):
    plan, results = Plan(write_study(tmp_path)), Results()
    finish(plan, results, lambda run: None if run.stage == "search" else {"test/loss": 1.0})
    with pytest.raises(AllDivergedError, match=r"arm 'narrow': every rate from 0\.\d+ to \d+\.?\d* diverged"):
        plan.chosen(results, "narrow")


def test_groups_are_searched_one_after_the_other(tmp_path):
    arms = {"both": {"rates": {"model.a": "search", "model.b": "search"}}}
    search = {**STUDY["search"], "grid": [1.0, 3.0, 10.0], "extensions": 0}
    plan, results = Plan(write_study(tmp_path, arms=arms, contrasts=None, search=search)), Results()
    runs = finish(
        plan, results, lambda run: {"val/loss": abs(run.rates["model.a"] - 10) + abs(run.rates["model.b"] - 1)}
    )
    pairs = [(run.rates["model.a"], run.rates["model.b"]) for run in runs if run.stage == "search"]
    # The second group starts at the middle; the first stays at its best; (10, 3) is the same run in both searches.
    assert pairs == [(1, 3), (3, 3), (10, 3), (10, 1), (10, 10)]
    assert plan.chosen(results, "both").rates == {"model.a": 10, "model.b": 1}


def test_the_rates_of_groups_become_lr_scale(tmp_path):
    recipe = {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1.0}},
        "lr_scale": {"lora": 7.0},
    }
    study = write_study(tmp_path, base=recipe, arms={"a": {"rates": {"nora": 1e-3, "head": 1e-2}}}, contrasts=None)
    (run, *_) = Plan(study).due(Results())
    assert run.recipe["optimizer"]["init_args"]["lr"] == 1e-3
    assert run.recipe["lr_scheduler"]["init_args"]["max_lr"] == 1e-3
    assert run.recipe["lr_scale"] == {"nora": 1.0, "head": pytest.approx(10.0)}


@pytest.mark.parametrize("group", ["head", "blocks.0.*"])
def test_rates_leave_out_no_group_with_a_rate_of_its_own(tmp_path, group):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0}}
    base = {"optimizer": optimizer, "lr_scale": {group: 10.0}}
    arms = {"a": {"rates": {"nora": 1e-3}}}
    message = f"the rates of the arm 'a' leave out {group!r}, whose rate is 10.0 times lr in its recipe"
    with pytest.raises(AdapterError, match=message.replace("*", "[*]")):
        Plan(write_study(tmp_path, base=base, arms=arms, contrasts=None))
    # An arm without rates keeps those of the recipe.
    (run, *_) = Plan(write_study(tmp_path, base=base, arms={"a": {}}, contrasts=None)).due(Results())
    assert run.recipe["lr_scale"] == {group: 10.0}


def test_final_runs_are_made_set_after_set(tmp_path):
    _, _, runs = searched(tmp_path, 1e-3)
    finals = [(run.set, run.arm) for run in runs if run.stage == "final"]
    assert [run for run in finals if run[1] == "narrow"] == [(0, "narrow"), (1, "narrow")]
    assert all(run.recipe["data"]["subset"] == run.set for run in runs)


def test_seeds_differ_between_sets_and_within(tmp_path):
    study = write_study(tmp_path, repeat={"sets": [0, 1], "set_keys": ["data.subset"], "seeds": [0, 1]}, search=None,
                        arms={"wide": {"rates": {RATE: 0.1}}}, contrasts=None)  # fmt: skip
    runs = Plan(study).due(Results())
    assert [run.recipe["seed_everything"] for run in runs] == [0, 1, 1000, 1001]


def test_what_changes_the_outcome_changes_the_run(tmp_path):
    def names(**changes):
        return [run.id for run in Plan(write_study(tmp_path, **changes)).due(Results())]

    same = names()
    assert names(question="another", margin=0.1, paths={"data.root": "elsewhere"}, run={"workers": 4}) == same
    assert not set(names(set={"trainer.max_epochs": 3})) & set(same)
    only_wide = names(arms={**STUDY["arms"], "wide": {"set": {"model.width": 4}, "rates": {RATE: 0.1}}})
    assert [new == old for new, old in zip(only_wide, same, strict=True)] == ["narrow" in name for name in same]


def test_the_recipe_is_changed_by_class_and_not_mixed(tmp_path):
    recipe = {"model": {"adapters": {"class_path": "a.A", "init_args": {"x": 1}}}}
    arms = {"b": {"set": {"model.adapters": {"class_path": "b.B"}}}, "c": {"set": {"model.adapters.init_args.x": 2}}}
    study = write_study(tmp_path, base=recipe, arms=arms, contrasts=None, search=None)
    recipes = {run.arm: run.recipe["model"]["adapters"] for run in Plan(study).due(Results())}
    assert recipes["b"] == {"class_path": "b.B"}
    assert recipes["c"] == {"class_path": "a.A", "init_args": {"x": 2}}


def test_a_noise_floor_runs_an_arm_again(tmp_path):
    floor = {"arm": "wide", "threads": 2}
    plan, results = Plan(write_study(tmp_path, noise_floor=floor)), Results()
    runs = finish(plan, results, lambda run: {"val/loss": 1.0, "test/loss": 1.0})
    noise = [run for run in runs if run.stage == "noise"]
    assert {run.threads for run in noise} == {2}
    final = {run.set: run for run in runs if run.stage == "final" and run.arm == "wide"}
    assert all(run.recipe == final[run.set].recipe for run in noise)
    found = {key: plan.finished(results, key, plan.chosen(results, key).rates, "noise") for key in ("wide", "narrow")}
    assert {key: len(records) for key, records in found.items()} == {"wide": 2, "narrow": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"worker": None}}, "section run has workers"),
        ({"metrc": 1}, "'metrc' is unknown; a study has question"),
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"a b": {}}}, "arm 'a b' must be a name"),
        ({"arms": {"a": {"rates": {RATE: "serch"}}}}, "serch"),
        ({"arms": {"a": {"rates": {RATE: -1.0}}}}, "give a number above 0"),
        ({"arms": {"a": {"sett": {"x": 1}}}}, "sett"),
        ({"arms": {"a": {"sett": {}}}}, "sett"),
        ({"contrasts": [["narrow", "wiide"]]}, "a contrast names 'wiide'; the arms are narrow, wide"),
        ({"contrasts": [["wide", "wide"]]}, "compares an arm with itself"),
        ({"contrasts": [["wide", "narrow"], ["narrow", "wide"]]}, "two contrasts compare the same arms"),
        ({"margin": 0.0}, "margin 0.0 must be a number above 0"),
        ({"repeat": {"sets": [0, 0], "set_keys": ["data.subset"]}}, "different numbers"),
        ({"repeat": {"sets": [0, 1]}}, "set_keys is empty, so that all sets would be equal"),
        ({"repeat": {"sets": [7], "set_keys": ["data.subset"]}}, "training set 7 is used in the search and in final"),
        ({"search": {**STUDY["search"], "grid": [0.1, 0.01]}}, "rising rates"),
        ({"search": {**STUDY["search"], "grid": [0.1]}}, "two or more"),
        ({"search": {**STUDY["search"], "metric": {"name": "test/loss", "better": "lower"}}}, "is of the test"),
        ({"metric": {"name": "test/loss"}}, "required: study.metric.better"),
        ({"search": None}, "searches a rate and there is no section search"),
        ({"noise_floor": {"arm": "wide"}}, "noise_floor changes nothing"),
        ({"metric": {"name": "test/loss", "better": "smaller"}}, "smaller"),
        ({"recipe": "missing.yaml"}, r"missing.yaml does not exist"),
    ],
)
def test_a_study_is_checked_before_it_runs(tmp_path, changes, message):
    with pytest.raises(AdapterError, match=message):
        Plan(write_study(tmp_path, **changes))


def test_a_study_file_runs_nothing(tmp_path):
    called = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "touched")]}}
    study = write_study(tmp_path, set={"model.x": called}, final={"model.y": [called]})
    assert study.set["model.x"] == called
    assert not (tmp_path / "touched").exists()


def test_the_studies_of_the_project_can_be_read():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "configs/studies").glob("*.yaml"))
    assert files
    for path in files:
        study = read_study(path)
        assert Plan(study).due(Results())
        assert yaml.safe_load(path.read_text())["question"] == study.question


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {}, a: {}}\n", "the key 'a' is given twice"),
        ("set: &a {x: *a}\n", "Circular reference"),
    ],
)
def test_yaml_is_read_strictly(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(AdapterError, match=message):
        read_study(tmp_path / "s.yaml")


WIDE = STUDY["arms"]["wide"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": {"model.width": 1, "model": {"width": 2}}}, "'model' and 'model.width' inside it"),
        ({"set": {3: 1}}, "3 is not a key"),
        ({"run": {"workers": None}}, "run.workers is empty"),
        ({"contrasts": "wide - narrow"}, "give a list"),
        ({"also": [{"name": "test/loss", "better": "lower", "scale": 100}]}, "name 'test/loss' twice"),
        ({"at_equal": {"by": METRIC, "read": []}}, "at_equal.read is empty; name what is compared"),
        ({"at_equal": {"by": METRIC, "read": [METRIC]}}, "at_equal names 'val/a' twice"),
        ({"at_equal": {"by": METRIC, "read": [{"nam": "b"}]}}, "'nam' is unknown; section at_equal.read"),
        (
            {"metric": {"name": "test/loss", "better": "lower", "scale": -1.0}},
            "scale of 'test/loss' is -1; give a number above 0",
        ),
        ({"search": {**STUDY["search"], "metric": {"name": "acc/Test", "better": "higher"}}}, "is of the test split"),
        ({"search": {**STUDY["search"], "set": {"data.val_split": "test"}}}, "names the test split"),
        ({"arms": {"narrow": WIDE, "wide": WIDE}}, "'narrow' and 'wide' have the same recipe and the same rates"),
        ({"arms": {**STUDY["arms"], "wide": {**WIDE, "set": {RATE: 0.3}}}}, "arms.wide.set sets the learning rate"),
        (
            {"arms": {**STUDY["arms"], "wide": {"set": {"optimizer.init_args": {"lr": 1}}}}},
            "sets the learning rate",
        ),
        ({"search": {**STUDY["search"], "set": {RATE: 0.3}}}, "search.set sets the learning rate"),
        ({"final": {"data.subset": 3}}, "final sets 'data.subset', which repeat.set_keys decides"),
    ],
)
def test_nothing_in_a_study_is_replaced_silently(tmp_path, changes, message):
    with pytest.raises(AdapterError, match=message):
        Plan(write_study(tmp_path, **changes))


def test_the_rate_reaches_a_schedule_that_an_arm_brings(tmp_path):
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 7.0}}
    arms = {"a": {"set": {"lr_scheduler": schedule}, "rates": {"lora": 0.1}}}
    (run, *_) = Plan(write_study(tmp_path, arms=arms, contrasts=None, search=None)).due(Results())
    assert run.recipe["lr_scheduler"]["init_args"]["max_lr"] == 0.1


def test_a_final_run_is_made_early(tmp_path):
    plan, results = Plan(write_study(tmp_path)), Results()
    stages = []
    while due := plan.due(results):
        run = due[0]
        metrics = {"val/loss": 1.0, "test/loss": 1.0}
        results.add(Record(run.id, run.arm, run.stage, run.set, run.seed, dict(run.rates), "done", metrics))
        stages.append(run.stage)
    assert stages[:3] == ["search", "final", "search"]
    assert stages.count("final") == 4


def ended(plan, stage="final", **changes):
    run = next(run for run in plan.due(Results()) if run.stage == stage)
    record = Record(run.id, run.arm, stage, run.set, run.seed, dict(run.rates), "done", protocol=dict(run.protocol))
    return replace(record, **changes)


def test_what_a_run_must_leave(tmp_path):
    plan = Plan(write_study(tmp_path, also=[{"name": "test/top5", "better": "higher"}]))
    whole = ended(plan, metrics={"test/loss": 0.5, "test/top5": 1.0})
    plan.check(whole, {"error": np.array([0.0, 1.0])})
    with pytest.raises(AdapterError, match=r"did not log 'test/loss'; it logged loss"):
        plan.check(replace(whole, metrics={"loss": 1.0}), {})
    with pytest.raises(AdapterError, match=r"also: .* did not log 'test/top5'"):
        plan.check(replace(whole, metrics={"test/loss": 0.5}), {"error": np.array([0.5])})
    with pytest.raises(AdapterError, match=r"left no values 'error' for each test item, but other"):
        plan.check(whole, {"other": np.array([0.5])})
    with pytest.raises(AdapterError, match=r"the mean of the items 'error' .* is 1, but test/loss is 0\.5"):
        plan.check(whole, {"error": np.array([1.0, 1.0])})
    with pytest.raises(AdapterError, match=r"search\.metric: .* did not log 'val/loss'; it logged val/los"):
        plan.check(ended(plan, "search", metrics={"val/los": 1.0}), {})


def test_a_final_run_whose_metric_is_not_finite_has_diverged(tmp_path):
    plan, results = Plan(write_study(tmp_path)), Results()
    finish(plan, results, lambda run: {"val/loss": 1.0, "test/loss": math.nan, "test/other": 1.0})
    found = plan.finished(results, "wide", plan.chosen(results, "wide").rates)
    assert {(record.status, record.message) for record in found.values()} == {("diverged", "test/loss is nan")}


def test_runs_of_an_earlier_file_are_told_apart(tmp_path):
    results = Results()
    finish(Plan(write_study(tmp_path)), results, lambda run: {"val/loss": 1.0, "test/loss": 1.0})
    wide = {"set": {"model.width": 4}, "rates": {RATE: 0.1}}
    later = Plan(write_study(tmp_path, arms={**STUDY["arms"], "wide": wide}))
    unused = {record.id for record in results.records} - later.used(results)
    assert len(unused) == 2
    assert all(name.startswith("wide-final") for name in unused)
    assert "2 more are of an earlier version of the file" in status(later.study, results)


def test_a_study_goes_on_without_an_arm_whose_search_only_diverged(tmp_path):
    study, results = write_study(tmp_path), Results()
    runs = finish(Plan(study), results, lambda run: None if run.stage == "search" else {"test/loss": 1.0})
    assert [run.arm for run in runs if run.stage == "final"] == ["wide", "wide"]
    assert "every rate diverged" in status(study, results)


def test_later_changes_of_what_was_named_are_seen(tmp_path):
    study = write_study(tmp_path, margin=1.0)
    records = [ended(Plan(study))]
    assert changes(study, records) == []
    later = write_study(tmp_path, margin=2.0, contrasts=[["narrow", "wide"]])
    assert changes(later, records) == ["the contrasts were wide - narrow before", "the margin was 1 before"]
    more = write_study(tmp_path, margin=1.0, arms={**STUDY["arms"], "third": {"set": {"model.width": 9}}})
    assert changes(more, records) == ["arms were added (third), which should say `exploratory: true`"]
    assert changes(study, [replace(records[0], protocol={})]) == []
    fewer = write_study(tmp_path, margin=1.0, repeat={**STUDY["repeat"], "sets": [0, 1, 2]})
    assert changes(fewer, records) == ["the training sets were 0, 1 before"]
    grid = {**STUDY["search"], "grid": [1e-3, 1e-2]}
    (sentence,) = changes(write_study(tmp_path, margin=1.0, search=grid), records)
    assert sentence.startswith("the search was by val/loss (lower is better) on the sets ")


def test_a_contrast_counts_after_its_arm_was_declared_exploratory(tmp_path):
    study = write_study(tmp_path)
    records = [ended(Plan(study))]
    assert family_of(study, records) == family_of(study, []) == 1
    demoted = {**STUDY["arms"], "wide": {**STUDY["arms"]["wide"], "exploratory": True}}
    later = write_study(tmp_path, arms=demoted)
    assert (family_of(later, records), family_of(later, [])) == (1, 0)
    assert changes(later, records) == ["arms were taken out of the comparison (wide)"]
    # An arm that was not there when the first runs ended may become exploratory, as it should.
    first = replace(records[0], protocol={**records[0].protocol, "arms": ["narrow"]})
    assert changes(later, [first, *records]) == []


def test_a_program_is_found_beside_the_study(tmp_path):
    assert replace(write_study(tmp_path), program="line.py").called() == str((tmp_path / "line.py").resolve())
    for program, message in (("lines.py", "does not exist; give it relative"), ("visio", "is not a module")):
        with pytest.raises(AdapterError, match=message):
            replace(write_study(tmp_path), program=program).called()


def test_a_folder_belongs_to_one_study(tmp_path):
    study = write_study(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("others")
    with pytest.raises(AdapterError, match="holds the results of the study 'others', and this is 'lines'"):
        run_study(study, tmp_path / "out")
    with pytest.raises(AdapterError, match="cannot be written to"):
        run_study(study, study.path)
