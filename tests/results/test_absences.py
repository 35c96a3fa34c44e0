"""Reports name elements that are missing from training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mbqueue.results.absences import absences
from mbqueue.results.folder import read_recorded
from mbqueue.results.record import record_experiment
from mbqueue.results.report.page import write_report
from mbqueue.results.tables import Predictions
from mbqueue.task import FORMATION_ENERGY, Target


def crystals(*compositions):
    n = len(compositions)
    return Predictions([str(i) for i in range(n)], list(compositions), np.ones(n, int), np.zeros(n), np.zeros(n))


def test_elements_of_no_test_crystal_are_not_named():
    assert absences({"0": {"absent_elements": ["Ac", "Xe"]}}, {0: crystals("NaCl")}, FORMATION_ENERGY.target) == []


def test_folds_that_miss_the_same_elements_are_named_once():
    folds = {str(fold): {"absent_elements": ["Ac", "Xe"]} for fold in range(3)}
    (said,) = absences(folds, {fold: crystals("NaCl", "XeF2") for fold in range(3)}, FORMATION_ENERGY.target)
    assert said.startswith("Folds 0, 1, 2 have no training crystals with Xe, so it has a reference energy of 0.")


@pytest.mark.parametrize(
    ("kind", "value"),
    [("scalar", "mean of the training targets"), ("class", "log-odds of the training set")],
)
def test_the_reference_value_of_an_absent_element_depends_on_the_target(kind, value):
    target = Target(name="a property", unit="", kind=kind)
    (said,) = absences({"0": {"absent_elements": ["Xe", "Ac"]}}, {0: crystals("XeF2", "Ac2O3")}, target)
    assert f"with Xe, Ac, so each has the {value} as its reference value. Predictions" in said


def test_folds_that_miss_other_elements_are_named_separately():
    folds = {str(fold): {"absent_elements": ["Xe", "Ac"]} for fold in range(2)}
    found = absences(folds, {0: crystals("XeF2"), 1: crystals("Ac2O3")}, FORMATION_ENERGY.target)
    assert [said.split(",")[0] for said in found] == [
        "Fold 0 has no training crystals with Xe",
        "Fold 1 has no training crystals with Ac",
    ]


@pytest.mark.parametrize("absent", [["Fe", "Xe"], ["Xe"]])
def test_both_pages_name_only_missing_elements_of_the_test_part(tmp_path, fill, inputs, absent):
    record_experiment(fill(tmp_path), dataclasses.replace(inputs, absent_elements={0: absent, 1: absent}))
    pages = [(tmp_path / "RESULTS.md"), write_report(read_recorded(tmp_path), tmp_path / "r.html")]
    for page in pages:
        assert ("Folds 0, 1 have no training crystals with Fe" in page.read_text()) == ("Fe" in absent)
