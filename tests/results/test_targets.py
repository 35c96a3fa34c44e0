"""Reports, tables and files show the name, unit and scores of the experiment's target (a scalar or a class)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mbqueue.dashboard.comparison import ComparisonView
from mbqueue.errors import ResultsError
from mbqueue.experiment import parse_spec
from mbqueue.results.compare import compare
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.leaderboard import overlap_note
from mbqueue.results.record import RecordInputs, record_experiment
from mbqueue.results.report.analysis import confusion, reliability, roc
from mbqueue.results.report.comparison import write_comparison
from mbqueue.results.report.page import draw, write_report
from mbqueue.results.scores import roc_auc
from mbqueue.results.tables import Predictions, predictions_file, read_predictions, write_predictions
from mbqueue.task import FORMATION_ENERGY, Target

TARGETS = {
    "scalar": {"name": "bulk modulus", "unit": "GPa", "kind": "scalar", "column": "K"},
    "class": {"name": "metallicity", "unit": "", "kind": "class", "column": "is_metal"},
}


def as_class(table: Predictions, seed: int) -> Predictions:
    """Turn made-up predictions of energies into classes and probabilities for the same crystals."""
    y_true = (table.y_true > np.median(table.y_true)).astype(float)
    noise = np.random.default_rng(seed).normal(0, 0.25, len(table))
    return dataclasses.replace(table, y_true=y_true, y_pred=np.clip(0.3 + 0.4 * y_true + noise, 0.01, 0.99))


@pytest.fixture
def recorded_of(tmp_path: Path, fill: Callable[..., Path], inputs: RecordInputs) -> Callable[..., Recorded]:
    """Return a function that creates a recorded experiment with the given kind of target."""

    def make(kind: str, name: str = "one", **target: Any) -> Recorded:
        folder = fill(tmp_path / kind / name, seed=len(name))
        if kind == "class":
            for fold in (0, 1):
                path = predictions_file(folder, fold)
                write_predictions(path, as_class(read_predictions(path), seed=len(name)))
        content = {"name": name, "data": {"dataset": "mine.csv"}, "target": {**TARGETS[kind], **target}}
        spec = parse_spec(content, source="test")
        mine = dataclasses.replace(inputs.dataset, name="mine.csv", source="mine.csv")
        record_experiment(folder, dataclasses.replace(inputs, experiment=name, spec=spec.to_json(), dataset=mine))
        return read_recorded(folder)

    return make


def console_text(comparison: Any) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(ComparisonView(comparison))
    return captured.get()


@pytest.mark.parametrize("kind", TARGETS)
def test_no_text_mentions_formation_energy_or_its_unit(recorded_of: Any, tmp_path: Path, kind: str) -> None:
    one, other = recorded_of(kind), recorded_of(kind, "another")
    comparison = compare([one, other])
    texts = {path.name: path.read_text() for path in one.folder.iterdir() if path.suffix in (".md", ".json", ".csv")}
    texts["report.html"] = write_report(one, tmp_path / "report.html").read_text()
    texts["comparison.html"] = write_comparison(comparison, tmp_path / "comparison.html").read_text()
    texts["compare"] = console_text(comparison)
    for name, text in texts.items():
        assert not _units(text), name
        assert "formation energ" not in text.lower(), name
    assert TARGETS[kind]["name"] in texts["RESULTS.md"]
    assert TARGETS[kind]["name"] in texts["report.html"]
    if kind == "scalar":
        assert all("GPa" in texts[name] for name in ("RESULTS.md", "report.html", "comparison.html", "compare"))


def _units(text: str) -> list[str]:
    return [unit for unit in ("eV/atom", " eV ", "(eV)") if unit in text]


def test_a_class_is_reported_by_its_curves_in_place_of_parity(recorded_of: Any) -> None:
    figures = draw(recorded_of("class"))
    assert {"roc", "reliability", "confusion"} <= figures.keys()
    assert not {"parity", "errors", "by-target", "leaderboard"} & figures.keys()
    assert {"parity", "errors", "by-target"} <= draw(recorded_of("scalar")).keys()


def test_a_class_is_headed_by_its_roc_auc(recorded_of: Any, tmp_path: Path) -> None:
    one = recorded_of("class")
    content = json.loads((one.folder / "results.json").read_text())
    tables = [one.predictions[fold] for fold in (0, 1)]
    areas = [roc_auc(table.y_true > 0.5, table.y_pred) for table in tables]
    assert content["summary"]["rocauc"] == pytest.approx({"mean": np.mean(areas), "std": np.std(areas)})
    said = f"ROC-AUC {np.mean(areas):.4f} ± {np.std(areas):.4f}"
    assert said in (one.folder / "RESULTS.md").read_text()
    assert said in write_report(one, tmp_path / "report.html").read_text()


def test_experiments_with_other_units_or_kinds_are_not_compared(recorded_of: Any) -> None:
    with pytest.raises(ResultsError, match=r"\(GPa\), of kind scalar, and other the bulk modulus \(eV/A\^3\)"):
        compare([recorded_of("scalar"), recorded_of("scalar", "other", unit="eV/A^3")])
    with pytest.raises(ResultsError, match=r"cannot be compared\. .* of kind class\. Compare"):
        compare([recorded_of("scalar"), recorded_of("class", "other")])


def test_the_curve_the_diagram_and_the_matrix_are_those_of_scikit_learn(recorded_of: Any) -> None:
    from sklearn import metrics
    from sklearn.calibration import calibration_curve

    table = recorded_of("class").all_predictions
    curve = roc(table)
    assert curve is not None
    false, true, _ = metrics.roc_curve(table.y_true, table.y_pred, drop_intermediate=False)
    assert np.allclose(curve.false_positive, false)
    assert np.allclose(curve.true_positive, true)
    assert curve.area == pytest.approx(metrics.auc(false, true))
    assert confusion(table).tolist() == metrics.confusion_matrix(table.y_true, table.y_pred > 0.5).tolist()
    observed, predicted = calibration_curve(table.y_true, table.y_pred, n_bins=10)
    found = reliability(table)
    assert np.allclose(found.predicted, predicted)
    assert np.allclose(found.observed, observed)


@pytest.mark.parametrize(
    ("unit", "fine"),
    [("eV/atom", "meV/atom"), ("eV", "meV"), ("eV/unit cell", "meV/unit cell"), ("eV^2", "eV^2"), ("eV²", "eV²")],
)
def test_small_differences_take_a_thousandth_only_of_a_unit_that_is_linear_in_ev(unit: str, fine: str) -> None:
    factor, target = Target(name="made up", unit=unit, kind="scalar").fine
    assert (target.unit, factor) == (fine, 1.0 if fine == unit else 1000.0)


@pytest.mark.parametrize("trainable", ["none", "head"])
def test_only_models_with_pretrained_weights_are_said_to_have_seen_the_pretraining_data(trainable: str) -> None:
    spec = {"model": {"pretrained": "0.3.0", "trainable": trainable}}
    gap = Target(name="gap", unit="eV", kind="scalar")
    blend = {"model": {**spec["model"], "trainable": "all"}, "made_from": {"members": [{"spec": spec}, {"spec": spec}]}}
    again = {"model": {**spec["model"], "trainable": "none"}, "made_from": {"members": [{"spec": spec}]}}
    blend_of_again = {**blend, "made_from": {"members": [{"spec": again}, {"spec": again}]}}
    for one in (spec, blend, again, blend_of_again):
        assert ("MPtrj" in overlap_note(gap, one, dataset="own.csv")) is (trainable == "head")
    told = overlap_note(FORMATION_ENERGY.target, spec, dataset="own.csv")
    assert "MPtrj" in told, "energies start from CHGNet's own, untrained too"


@pytest.mark.parametrize(("dataset", "is_known"), [("matbench_mp_e_form", True), ("sample", False), ("own.csv", False)])
def test_only_matbench_crystals_are_known_to_be_in_the_pretraining_data(dataset: str, is_known: bool) -> None:
    spec = {"model": {"pretrained": "0.3.0", "trainable": "head"}}
    told = overlap_note(FORMATION_ENERGY.target, spec, dataset=dataset)
    assert ("has seen most crystals" in told) is is_known
    assert ("may have seen many of these crystals" in told) is not is_known
    assert "MPtrj" in told
