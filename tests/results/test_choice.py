"""Every display of scores marks the folds on which settings were chosen."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from mbqueue.dashboard.comparison import ComparisonView
from mbqueue.experiment import hash_of_spec, parse_spec
from mbqueue.results.choice import choice_note, chosen_on
from mbqueue.results.compare import compare
from mbqueue.results.folder import read_recorded
from mbqueue.results.members import members_of, trained_specs
from mbqueue.results.record import record_experiment
from mbqueue.results.report.comparison import write_comparison
from mbqueue.results.report.page import write_report
from mbqueue.results.tables import is_blend

CHOSEN = {"search": "rates", "trial": 3, "trials": 12, "folds": [0]}
NOTE = (
    "These settings were chosen on fold 0. Trial 3 had the lowest validation MAE on fold 0 among the 12 "
    "trials of the search rates."
)


@pytest.fixture
def make(tmp_path, fill, inputs):
    """A recorded experiment of two folds."""

    def build(name, *, chosen=None):
        folder = fill(tmp_path / name, folds=(0, 1), seed=sum(name.encode()))
        spec = {**inputs.spec, **({"chosen": chosen} if chosen else {})}
        record_experiment(folder, dataclasses.replace(inputs, experiment=name, folds=(0, 1), spec=spec))
        return read_recorded(folder)

    return build


def terminal(comparison, *, ascii_only=False):
    console = Console(width=110, file=io.StringIO())
    options = console.options.update(width=110)
    options.encoding = "ascii" if ascii_only else "utf-8"
    with console.capture() as captured:
        for segment in console.render(ComparisonView(comparison), options):
            console.out(segment.text, end="")
    return captured.get()


def test_the_files_mark_the_fold_and_say_what_that_means(make, tmp_path):
    tuned = make("tuned", chosen=CHOSEN)
    content = json.loads((tuned.folder / "results.json").read_text())
    assert [entry.get("took_part_in_choice") for entry in content["folds"].values()] == [True, None]
    assert NOTE in content["notes"]["choice"]
    page = (tuned.folder / "RESULTS.md").read_text()
    assert NOTE in page
    assert re.findall(r"^\| (\d.*?) \|", page, re.MULTILINE) == ["0 †", "1"]
    report = write_report(tuned, tmp_path / "report.html").read_text()
    assert NOTE in report
    assert ">0 †</td>" in report
    assert ">1</td>" in report


def test_comparisons_mark_the_scores_of_that_experiment_alone(make, tmp_path):
    comparison = compare([make("plain"), make("tuned", chosen=CHOSEN)])
    marked = {one.name: one.content["folds"]["0"]["scores"]["mae"] for one in comparison.recorded}
    html = write_comparison(comparison, tmp_path / "comparison.html").read_text()
    for said, mark in ((html, "†"), (terminal(comparison), "†"), (terminal(comparison, ascii_only=True), "*")):
        assert said.count(f"{marked['tuned']:.4f} {mark}") == 1
        assert f"{marked['plain']:.4f} {mark}" not in said
        assert f"tuned: {mark} These settings were chosen on fold 0" in " ".join(said.split())


def test_an_experiment_that_was_not_chosen_has_no_mark_and_the_bytes_that_it_had(make, tmp_path):
    plain = make("plain")
    texts = [path.read_text() for path in (plain.folder / "results.json", plain.folder / "RESULTS.md")]
    texts.append(write_report(plain, tmp_path / "report.html").read_text())
    assert not any("†" in text or "choice" in text.replace("choices", "") for text in texts[:2])
    assert "settings were chosen on" not in texts[2]


def test_a_blend_of_a_chosen_experiment_has_its_marks():
    members = [{"experiment": name, "spec": {"chosen": CHOSEN}} for name in ("a", "b")]
    other = {"experiment": "c", "spec": {"chosen": {**CHOSEN, "search": "sizes", "folds": [2]}}}
    blend = {"made_from": {"members": [*members, {"experiment": "d", "spec": {}}, other], "weights": "mean"}}
    assert chosen_on(blend) == (0, 2)
    assert choice_note(blend).count("search rates") == choice_note(blend).count("search sizes") == 1


def test_a_blend_of_the_choices_of_two_searches_names_each_with_its_own_folds():
    first, second = ({"search": name, "trial": 1, "trials": 3, "folds": [fold]} for fold, name in enumerate("ab"))
    members = [{"spec": {"chosen": chosen}} for chosen in (first, second)]
    note = choice_note({"chosen": {**first, "folds": [0, 1]}, "made_from": {"members": members}})
    assert "on fold 0 among the 3 trials of the search a." in note
    assert "on fold 1 among the 3 trials of the search b." in note
    assert "MAE on folds 0, 1" not in note


def test_a_search_on_two_folds_is_not_said_to_have_avoided_the_test_crystals_of_both():
    note = choice_note({"chosen": {**CHOSEN, "folds": [0, 1]}})
    assert "did not use the test crystals of folds" not in note
    assert "In training on each of these folds, the search did not use that fold's test crystals." in note
    assert "The search did not use the test crystals of fold 0." in choice_note({"chosen": CHOSEN})


@pytest.mark.parametrize("made_from", [{}, {"made_from": None}])
def test_an_experiment_that_trains_its_own_models_has_no_members(made_from):
    spec = {"model": {}, **made_from}
    assert members_of(spec) == []
    assert trained_specs(spec) == [spec]
    assert not is_blend(spec)
    assert chosen_on(spec) == ()


def test_choosing_settings_changes_no_hash():
    spec = parse_spec({"name": "a", "data": {"dataset": "sample"}, "chosen": CHOSEN}, source="test").to_json()
    assert spec["chosen"] == CHOSEN
    plain = parse_spec({"name": "a", "data": {"dataset": "sample"}}, source="test").to_json()
    assert "chosen" not in plain
    assert hash_of_spec(spec) == hash_of_spec(plain)
