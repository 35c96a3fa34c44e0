"""mbqueue's scores are equal to matbench's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mbqueue.errors import ResultsError
from mbqueue.results.leaderboard import leaderboard, reasons_against
from mbqueue.results.scores import leaderboard_measure, measures_of, over_folds, score
from mbqueue.task import FORMATION_ENERGY, TASKS, Target

ENERGY = FORMATION_ENERGY.target
WHOLE = {"dataset": "matbench_mp_e_form", "official": True, "n": 132_752, "dropped": 0, "folds": range(5)}
CLASS = Target(name="metallicity", unit="", kind="class")


def test_scores_equal_those_of_matbench():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports warn
        from matbench.data_ops import score_array
    rng = np.random.default_rng(0)
    y_true = np.concatenate([rng.normal(0, 1, 200), [0.0, 1e-6]])  # MAPE ignores targets near 0
    y_pred = y_true + rng.normal(0, 0.1, 202)
    expected = score_array(y_true, y_pred, "regression")
    ours = score(y_true, y_pred, ENERGY)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("spread", [0.05, 0.4, 3.0])
def test_scores_of_a_class_equal_those_of_scikit_learn_and_matbench(spread):
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports warn
        from matbench.data_ops import score_array
    rng = np.random.default_rng(1)
    y_true = (rng.random(500) < 0.3).astype(float)
    y_pred = np.round(np.clip(0.35 + 0.3 * y_true + rng.normal(0, spread, 500), 0.001, 0.999), 3)  # with ties
    ours = score(y_true, y_pred, CLASS)
    assert ours["rocauc"] == pytest.approx(metrics.roc_auc_score(y_true, y_pred), rel=1e-12)
    assert ours["log_loss"] == pytest.approx(metrics.log_loss(y_true, y_pred), rel=1e-12)
    theirs = score_array((y_true > 0.5).tolist(), y_pred.tolist(), "classification")
    for name in ("accuracy", "balanced_accuracy", "f1"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
    # matbench turns probabilities into classes before it computes its ROC AUC.
    assert ours[leaderboard_measure(CLASS).key] == pytest.approx(theirs["rocauc"], rel=1e-12)


def test_a_test_part_of_one_class_has_no_area_under_its_curve():
    ours = score(np.ones(3), np.array([0.2, 0.6, 0.9]), CLASS)
    assert ours["rocauc"] is ours["balanced_accuracy"] is None
    assert over_folds([ours], CLASS)["rocauc"] is None


@pytest.mark.parametrize("target", [ENERGY, CLASS])
def test_every_measure_is_scored(target):
    scores = score(np.array([0.0, 1.0]), np.array([0.2, 0.7]), target)
    assert list(scores) == ["n", *(measure.key for measure in measures_of(target))]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.dataset)
def test_the_leaderboard_of_each_task_is_best_first_and_ends_with_the_dummy(task):
    scores = [row.score for row in leaderboard(task.dataset)]
    assert len(scores) == 9
    assert scores == sorted(scores, reverse=not leaderboard_measure(task.target).is_error)
    assert leaderboard(task.dataset)[-1].name == "Dummy"


def test_median_is_that_of_absolute_errors():
    assert score(np.zeros(3), np.array([-3.0, 1.0, 2.0]), ENERGY)["median"] == 2.0


def test_mape_of_targets_that_are_all_zero_is_absent():
    assert score(np.zeros(3), np.ones(3), ENERGY)["mape"] is None


def test_no_crystals_have_no_scores():
    with pytest.raises(ResultsError, match="without crystals"):
        score(np.zeros(0), np.zeros(0), ENERGY)


def test_spread_over_folds_is_the_population_deviation():
    folds = [score(np.ones(2), np.ones(2) + error, ENERGY) for error in (0.1, 0.3)]
    summary = over_folds(folds, ENERGY)
    assert summary["mae"] == pytest.approx({"mean": 0.2, "std": 0.1})


def test_a_score_that_one_fold_lacks_has_no_mean():
    folds = [score(np.ones(2), np.ones(2), ENERGY), score(np.zeros(2), np.ones(2), ENERGY)]
    assert over_folds(folds, ENERGY)["mape"] is None


def test_only_all_official_crystals_in_all_five_folds_are_comparable():
    assert (
        reasons_against(dataset="matbench_mp_e_form", official=True, n=FORMATION_ENERGY.n, dropped=0, folds=range(5))
        == []
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"official": False}, "not from the official file"),
        ({"n": 2000}, "only 2,000 of the 132,752"),
        ({"dropped": 1}, "only"),
        ({"folds": (0, 1, 4)}, "folds 2, 3 are missing"),
    ],
)
def test_anything_less_is_not_comparable_and_says_why(change, reason):
    whole = {
        "dataset": "matbench_mp_e_form",
        "official": True,
        "n": FORMATION_ENERGY.n,
        "dropped": 0,
        "folds": range(5),
    }
    assert reason in reasons_against(**{**whole, **change})[0]
