"""Scores equal matbench's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mbqueue.errors import ResultsError
from mbqueue.results.leaderboard import reasons_against
from mbqueue.results.scores import over_folds, score
from mbqueue.task import FORMATION_ENERGY


def test_scores_equal_those_of_matbench():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports
        from matbench.data_ops import score_array
    rng = np.random.default_rng(0)
    y_true = np.concatenate([rng.normal(0, 1, 200), [0.0, 1e-6]])  # the last two do not count in mape
    y_pred = y_true + rng.normal(0, 0.1, 202)
    expected = score_array(y_true, y_pred, "regression")
    ours = score(y_true, y_pred).to_json()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-12), name


def test_median_is_that_of_absolute_errors():
    assert score(np.zeros(3), np.array([-3.0, 1.0, 2.0])).median == 2.0


def test_mape_of_targets_that_are_all_zero_is_absent():
    assert score(np.zeros(3), np.ones(3)).mape is None


def test_no_crystals_have_no_scores():
    with pytest.raises(ResultsError, match="without crystals"):
        score(np.zeros(0), np.zeros(0))


def test_spread_over_folds_is_the_population_deviation():
    folds = [score(np.ones(2), np.ones(2) + error).to_json() for error in (0.1, 0.3)]
    summary = over_folds(folds)
    assert summary["mae"] == pytest.approx({"mean": 0.2, "std": 0.1})


def test_a_score_that_one_fold_lacks_has_no_mean():
    folds = [score(np.ones(2), np.ones(2)).to_json(), score(np.zeros(2), np.ones(2)).to_json()]
    assert over_folds(folds)["mape"] is None


def test_only_all_official_crystals_in_all_five_folds_are_comparable():
    assert reasons_against(official=True, n=FORMATION_ENERGY.n, dropped=0, folds=range(5)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"official": False}, "not those of the official file"),
        ({"n": 2000}, "only 2,000 of the 132,752"),
        ({"dropped": 1}, "only"),
        ({"folds": (0, 1, 4)}, "folds 2, 3 of the five are missing"),
    ],
)
def test_anything_less_is_not_comparable_and_says_why(change, reason):
    whole = {"official": True, "n": FORMATION_ENERGY.n, "dropped": 0, "folds": range(5)}
    assert reason in reasons_against(**{**whole, **change})[0]
