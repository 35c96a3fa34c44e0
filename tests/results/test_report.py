"""The numbers in a report, and its HTML as a parser reads it. browser_check.py opens a report in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mbqueue.results.compare import compare
from mbqueue.results.folder import Recorded, read_recorded, read_unfinished
from mbqueue.results.leaderboard import leaderboard
from mbqueue.results.record import record_experiment
from mbqueue.results.report import analysis
from mbqueue.results.report.comparison import write_comparison
from mbqueue.results.report.elements import POSITIONS, elements_of
from mbqueue.results.report.page import write_report
from mbqueue.results.report.sessions import Span
from mbqueue.results.tables import (
    Predictions,
    history_file,
    predictions_file,
    read_history,
    write_history,
    write_predictions,
)

PLOTS = [
    "learning-curves", "parity", "errors", "by-atoms", "by-target", "by-elements", "periodic-table",
    "sessions",
]  # fmt: skip


class Page(HTMLParser):
    """Collects ids, links, everything that a browser would fetch, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        elif "src" in found or tag in ("link", "iframe", "object", "embed", "base"):
            self.fetched.append(str(found))

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data + " "


def report_of(recorded, tmp_path, **options):
    return Page(write_report(recorded, tmp_path / "report.html", **options).read_text(encoding="utf-8"))


@pytest.fixture
def recorded(recorded_folder):
    return read_recorded(recorded_folder)


def rows(*val_mae, train=None):
    train = train or val_mae
    return [
        {"epoch": epoch, "val_mae": v, "train_mae": t}
        for epoch, (v, t) in enumerate(zip(val_mae, train, strict=True), 1)
    ]


def late_rise(last):
    """Twenty epochs whose validation error rises to ``last`` in the last three, while the training error falls."""
    falling = [0.05 - 0.002 * epoch for epoch in range(17)]
    return rows(*falling, 0.019, 0.02, last, train=[0.05 - 0.0024 * epoch for epoch in range(20)])


def test_the_report_holds_every_plot_once_and_fetches_nothing(recorded, tmp_path):
    page = report_of(recorded, tmp_path)
    assert [name for name in page.ids if name.startswith("plot-")] == [f"plot-{name}" for name in PLOTS]
    assert page.fetched == []


def test_the_browser_is_forbidden_every_request(recorded, tmp_path):
    text = write_report(recorded, tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.search(r'<meta http-equiv="Content-Security-Policy" content="default-src \'none\';', text)


def test_every_plot_is_given_valid_json_without_nan(recorded, tmp_path):
    text = write_report(recorded, tmp_path / "r.html").read_text(encoding="utf-8")
    calls = re.findall(r'Plotly\.newPlot\(\s*"plot-([a-z-]+)",\s*(\[.*?\]),\s*\{', text, flags=re.DOTALL)
    assert [name for name, _ in calls] == PLOTS
    for _, data in calls:
        json.loads(data, parse_constant=lambda word: pytest.fail(f"{word} in a figure"))


def test_the_report_shows_the_score_and_the_overlap(recorded, tmp_path):
    text = report_of(recorded, tmp_path).text
    mae = recorded.content["summary"]["mae"]
    assert f"MAE {mae['mean']:.4f} ± {mae['std']:.4f} eV/atom" in text
    assert "MPtrj" in text


def test_the_report_is_the_same_for_the_same_results(recorded, tmp_path):
    first = write_report(recorded, tmp_path / "a.html").read_bytes()
    assert write_report(recorded, tmp_path / "b.html").read_bytes() == first


def test_an_experiment_without_training_has_no_learning_curves(tmp_path, fill, inputs):
    folder = fill(tmp_path / "x", epochs=0)
    record_experiment(folder, inputs)
    page = report_of(read_recorded(folder), tmp_path)
    assert "plot-learning-curves" not in page.ids
    assert "no epoch was trained" in page.text


@pytest.mark.parametrize("done", [(), (0,)])
def test_an_unfinished_experiment_is_reported_as_far_as_it_is(tmp_path, fill, inputs, history, done):
    folder = fill(tmp_path / "x", folds=done)
    write_history(history_file(folder, 1), history(2))
    page = report_of(read_unfinished(folder, inputs), tmp_path)
    assert f"Folds with predictions: {', '.join(map(str, done)) or 'none'}. Folds with finished epochs" in page.text
    assert "plot-learning-curves" in page.ids
    assert ("plot-parity" in page.ids) == bool(done)


def test_an_experiment_that_has_not_begun_can_be_reported(tmp_path, inputs):
    page = report_of(read_unfinished(tmp_path / "nothing", inputs), tmp_path)
    assert "Folds with predictions: none. Folds with finished epochs: none" in page.text


@pytest.mark.parametrize(("n", "heading"), [(8, "The 16 worst crystals"), (40, "The 50 worst crystals")])
def test_the_heading_of_the_worst_crystals_counts_those_that_are_listed(tmp_path, fill, inputs, n, heading):
    folder = fill(tmp_path / "x", n=n)
    assert heading in report_of(read_unfinished(folder, inputs), tmp_path).text


def test_foreign_text_cannot_become_markup(tmp_path, fill, inputs):
    folder = fill(tmp_path / "x", folds=(0, 1))
    evil = "</script><img src=x onerror=alert(1)>"
    table = Predictions([evil, "b"], ["NaCl", "<b>"], np.array([1, 2]), np.zeros(2), np.array([9.0, 1.0]))
    write_predictions(predictions_file(folder, 0), table)
    history = [{**row, "device": evil} for row in read_history(history_file(folder, 0))]
    write_history(history_file(folder, 0), history)
    record_experiment(folder, inputs)
    page = report_of(read_recorded(folder), tmp_path)
    assert "img" not in page.tags
    assert evil in page.text


def test_a_timeline_is_drawn_when_its_spans_are_known(recorded, tmp_path):
    spans = [
        Span(session="s1", device="L4", start=0.0, end=600.0, kind="train", label="fold 0 epoch 1"),
        Span(session="s1", device="L4", start=600.0, end=660.0, kind="publish"),
        Span(session="s2", device="T4", start=700.0, end=800.0, kind="something new"),
    ]
    page = report_of(recorded, tmp_path, timeline=spans)
    assert "plot-timeline" in page.ids
    # Check the table with the times of each session, and the note that publishing runs in a separate thread.
    assert "1. L4 10m00s 1m00s –" in page.text
    assert "all 10m00s 1m00s 1m40s" in page.text
    assert "A separate thread copies the commits" in page.text


def test_the_worst_crystals_are_linked_by_their_own_id_or_formula():
    from mbqueue.results.report import page

    def link(crystal_id):
        return page._link(analysis.Worst(0, crystal_id, "Fe2O3", 5, 0.0, 1.0, 1.0))

    assert 'materials/mp-149"' in link("mp-149")
    assert 'materials?formula=Fe2O3"' in link("mb-mp-e-form-000001")


def test_the_worst_are_the_largest_errors_of_all_folds_in_order(recorded):
    found = analysis.worst(recorded.predictions, 10)
    expected = np.sort(recorded.all_predictions.abs_error)[::-1][:10]
    np.testing.assert_array_equal([row.abs_error for row in found], expected)


def test_every_crystal_is_in_the_parity_density_the_histogram_and_the_trends(recorded):
    everything = recorded.all_predictions
    assert analysis.parity_density(everything).counts.sum() == len(everything)
    assert analysis.error_distribution(everything.abs_error).counts.sum() == len(everything)
    for trend in (analysis.by_atoms, analysis.by_target, analysis.by_element_count):
        assert trend(everything).counts.sum() == len(everything)


def test_errors_of_exactly_zero_are_counted():
    found = analysis.error_distribution(np.zeros(7))
    assert found.counts.sum() == 7
    assert found.quantiles[0.5] == 0.0


def test_the_mae_of_an_element_is_over_the_crystals_that_contain_it():
    table = Predictions(["a", "b"], ["NaCl", "Na2S"], np.ones(2, int), np.zeros(2), np.array([1.0, 3.0]))
    assert analysis.by_element(table) == {"Na": (2.0, 2), "S": (3.0, 1), "Cl": (1.0, 1)}


def test_every_element_has_its_own_place_and_the_grid_agrees_with_pymatgen():
    from pymatgen.core import Element

    assert len(set(POSITIONS.values())) == len(POSITIONS) == 118
    for symbol, (row, column) in POSITIONS.items():
        element = Element(symbol)
        if row < 7:
            assert (element.row, element.group) == (row + 1, column + 1), symbol


@pytest.mark.parametrize(
    ("formula", "elements"), [("LiFe(PO3)4", {"Li", "Fe", "P", "O"}), ("D2O", {"H", "O"}), ("C", {"C"})]
)
def test_elements_are_read_from_formulas(formula, elements):
    assert elements_of(formula) == elements


@pytest.mark.parametrize(
    ("history", "kind"),
    [
        ([], "untrained"),
        (rows(0.03, train=(0.05,)), "too few epochs"),
        (rows(0.02, 0.2, train=(0.02, 0.01)), "too few epochs"),
        (rows(0.3, 0.2, 0.1), "improving"),
        (rows(0.3, 0.1, 0.101, 0.1005), "settled"),
        (rows(0.3, 0.1, 0.12, 0.15, train=(0.3, 0.1, 0.05, 0.02)), "overfits"),
        (rows(0.3, 0.1, 0.12, 0.15, train=(0.3, 0.1, 0.2, 0.3)), "unsettled"),  # training and validation errors rise
        (rows(0.02, 0.05, 0.2, 1.0, 5.0, train=(0.02, 0.06, 0.3, 1.1, 5.0)), "diverged"),
        (late_rise(0.021), "unsettled"),
        (late_rise(0.06), "overfits"),  # the error rises in only 3 of 20 epochs, but more than doubles
    ],
)
def test_the_verdict_follows_gap_and_epochs_since_the_best(history, kind):
    assert analysis.verdict(0, history).kind == kind


@pytest.mark.parametrize("last", [0.021, 0.06])
def test_a_rise_since_the_best_epoch_is_reported_however_late_it_came(last):
    assert f"the validation MAE rose by {last / 0.018 - 1:.0%}" in analysis.verdict(0, late_rise(last)).text


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (rows(0.3, 0.1, 0.101, 0.1005), "the validation MAE ended at most 5% above that value"),
        (rows(0.3, 0.2, 0.1005, 0.1), "it lowered the validation MAE by at most 1%"),
    ],
)
def test_a_settled_fold_is_reported_with_what_settled_means(history, reason):
    assert f"; {reason}, so the training has settled; " in analysis.verdict(0, history).text


def test_an_overfitting_fold_is_reported_with_the_gaps_of_its_best_and_last_epoch():
    text = analysis.verdict(0, rows(0.03, 0.02, 0.03, 0.04, 0.05, train=(0.03, 0.02, 0.01, 0.005, 0.003))).text
    assert "at epoch 2 the gap to the training MAE is small" in text
    assert "at epoch 5 the validation MAE is 16.7 times the training MAE" in text


def test_a_gap_after_the_best_epoch_is_reported():
    text = analysis.verdict(0, rows(0.03, 0.0305, 0.0309, 0.0309, train=(0.03, 0.02, 0.01, 0.005))).text
    assert "at epoch 4 the validation MAE is 6.2 times the training MAE" in text


def test_extreme_ratios_are_capped():
    text = analysis.verdict(0, rows(0.03, 0.02, 0.0199, 0.0199, train=(0.03, 1e-8, 1e-8, 1e-8))).text
    assert "the validation MAE is more than 100 times the training MAE" in text
    assert "rose to more than 100 times that value" in analysis.verdict(0, rows(0.02, 1.0, 5.0)).text


def test_only_a_small_gap_gives_a_certain_verdict():
    assert not analysis.verdict(0, rows(0.3, 0.1, 0.1, 0.1)).is_doubtful
    assert analysis.verdict(0, rows(0.3, 0.1, 0.1, 0.1, train=(0.1, 0.05, 0.05, 0.05))).is_doubtful


def test_a_verdict_in_doubt_is_not_green(tmp_path, fill, inputs):
    folder = fill(tmp_path / "x", epochs=5)
    write_history(
        history_file(folder, 0), [{**row, "train_mae": 1e-4} for row in read_history(history_file(folder, 0))]
    )
    record_experiment(folder, inputs)
    page = write_report(read_recorded(folder), tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r'<b class="(doubtful|improving|settled)">', page) == ["doubtful", "improving"]


def test_a_large_gap_is_named_even_when_the_best_epoch_is_the_last():
    assert "fits its training crystals much better" in analysis.verdict(0, rows(0.3, 0.1, train=(0.2, 0.01))).text


def test_hours_of_sessions_add_up_to_what_was_recorded(recorded):
    found = analysis.session_hours(recorded.content, recorded.histories)
    assert [entry["id"] for entry in found] == ["s1"]
    trained = sum(row["seconds"] for history in recorded.histories.values() for row in history) / 3600
    assert sum(found[0]["folds"].values()) == pytest.approx(trained)
    assert sum(found[0]["folds"].values()) + found[0]["rest"] == pytest.approx(recorded.content["run"]["hours"])


def test_an_epoch_that_two_sessions_shared_counts_half_for_each(history):
    sessions = [{"id": name, "device": "L4", "seconds": 3600.0} for name in ("s1", "s2")]
    rows = [{**history(1)[0], "seconds": 3600.0, "session": "s1+s2"}]
    found = analysis.session_hours({"run": {"sessions": sessions}}, {3: rows})
    assert [(entry["id"], entry["folds"], entry["rest"]) for entry in found] == [
        ("s1", {3: 0.5}, 0.5),
        ("s2", {3: 0.5}, 0.5),
    ]


def test_a_comparison_is_one_file_with_the_leaderboard_and_the_paired_plot(recorded, tmp_path):
    dataset = {**recorded.content["dataset"], "name": "matbench_mp_e_form", "official": True}
    rows = [{"name": row.name, "mae": row.score} for row in leaderboard("matbench_mp_e_form")]
    board = {**recorded.content["leaderboard"], "rows": rows}
    official = {**recorded.content, "dataset": dataset, "leaderboard": board}
    both = [Recorded(recorded.folder, {**official, "experiment": name}) for name in ("small", "later")]
    path = write_comparison(compare(both), tmp_path / "c.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.ids.count("plot-paired") == 1
    assert page.fetched == []
    assert "later against small" in page.text
    assert "MAE of the reference" in page.text
    assert "A negative value means that the errors are smaller than those of the reference" in page.text
    assert all(row.name in page.text for row in leaderboard("matbench_mp_e_form"))


@pytest.mark.parametrize("dataset", ["sample", "data/mine.csv", "matbench_mp_e_form", "matbench_mp_gap"])
def test_a_report_shows_published_models_only_for_the_dataset_that_they_were_scored_on(tmp_path, fill, inputs, dataset):
    renamed = dataclasses.replace(inputs.dataset, name=dataset)
    folder = fill(tmp_path / dataset)
    record_experiment(folder, dataclasses.replace(inputs, dataset=renamed))
    recorded = read_recorded(folder)
    page = report_of(recorded, tmp_path)
    names = {row["name"] for row in recorded.content["leaderboard"]["rows"]}
    assert names == {row.name for row in leaderboard(dataset)}
    assert (
        f"Not comparable with the leaderboard: the crystals are not from the official file of {dataset}"
        in " ".join(page.text.split())
    ) == bool(names)
    assert ("plot-leaderboard" in page.ids) == ("leaderboard" in (folder / "RESULTS.md").read_text()) == bool(names)


def test_a_report_leaves_out_the_published_models_that_an_earlier_version_recorded_for_own_data(recorded, tmp_path):
    rows = [{"name": "coGN", "mae": 0.017}]
    earlier = {**recorded.content, "leaderboard": {**recorded.content["leaderboard"], "rows": rows}}
    assert "plot-leaderboard" not in report_of(Recorded(recorded.folder, earlier), tmp_path).ids


def test_a_comparison_on_own_crystals_leaves_the_leaderboard_out(recorded, tmp_path):
    later = Recorded(recorded.folder, {**recorded.content, "experiment": "later"})
    page = Page(write_comparison(compare([recorded, later]), tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "may have seen many of these crystals" in page.text
    assert "leaderboard" not in page.text


def test_132752_crystals_make_a_file_of_the_size_of_a_few(recorded, tmp_path, predictions):
    small = write_report(recorded, tmp_path / "small.html").stat().st_size
    big = Recorded(recorded.folder, recorded.content)
    tables = {fold: predictions(132_752 // 2, fold=fold) for fold in (0, 1)}
    object.__setattr__(big, "predictions", tables)  # otherwise the report reads the folder's predictions
    assert write_report(big, tmp_path / "big.html").stat().st_size < small + 1_000_000
