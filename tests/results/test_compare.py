"""Comparing experiments by crystal."""

from __future__ import annotations

import dataclasses

import pytest

from mbqueue.errors import ResultsError, UsageError
from mbqueue.results.compare import compare
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.record import record_experiment
from mbqueue.results.tables import Predictions, predictions_file, write_predictions


@pytest.fixture
def make(tmp_path, fill, inputs):
    """A recorded experiment whose errors are drawn with the given seed; ``change`` edits fold 0's predictions."""

    def build(name, *, seed=0, n=40, folds=(0, 1), change=None):
        folder = fill(tmp_path / name, seed=seed, n=n, folds=folds)
        if change is not None:
            from mbqueue.results.tables import read_predictions

            path = predictions_file(folder, 0)
            write_predictions(path, change(read_predictions(path)))
        record_experiment(folder, dataclasses.replace(inputs, experiment=name, folds=folds))
        return read_recorded(folder)

    return build


def only_pair(*recorded: Recorded):
    return compare(recorded).pairs[0]


def test_the_paired_difference_is_the_difference_of_the_errors(make):
    a, b = make("a"), make("b", seed=1)
    pair = only_pair(a, b)
    assert pair.n == 80
    assert pair.mean == pytest.approx(pair.mae_b - pair.mae_a)
    assert pair.mae_a == pytest.approx(a.all_predictions.abs_error.mean())
    assert pair.low < pair.mean < pair.high


def test_the_confidence_interval_uses_the_t_distribution(make):
    from scipy import stats

    a, b = make("a"), make("b", seed=1)
    pair = only_pair(a, b)
    differences = b.all_predictions.abs_error - a.all_predictions.abs_error
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (pair.low, pair.high) == pytest.approx((low, high))


def test_an_experiment_compared_with_its_equal_differs_by_0(make):
    pair = only_pair(make("a"), make("b"))
    assert (pair.mean, pair.low, pair.high, pair.share_better) == (0.0, 0.0, 0.0, 0.0)
    assert pair.verdict == "no significant difference on these crystals"


def test_the_better_experiment_is_named_whichever_comes_first(make):
    def worse(table):
        return dataclasses.replace(table, y_pred=table.y_pred + 5.0)

    a, b = make("a"), make("b", seed=0, change=worse)
    assert only_pair(a, b).verdict == "a is better"
    assert only_pair(b, a).verdict == "a is better"


def test_differences_of_the_folds_are_listed_one_by_one(make):
    a, b = make("a"), make("b", seed=1)
    expected = {fold: b.predictions[fold].abs_error.mean() - a.predictions[fold].abs_error.mean() for fold in (0, 1)}
    assert only_pair(a, b).per_fold == pytest.approx(expected)


def test_rows_are_matched_by_id_not_by_place(make):
    def reverse(table):
        return Predictions(
            table.ids[::-1], table.compositions[::-1], table.n_atoms[::-1], table.y_true[::-1], table.y_pred[::-1]
        )

    pair = only_pair(make("a"), make("b", change=reverse))
    assert pair.low == pair.mean == pair.high == 0


def test_only_common_crystals_are_compared(make):
    pair = only_pair(make("a"), make("b", seed=1, folds=(1,)))
    assert pair.n == 40
    assert list(pair.per_fold) == [1]


def test_experiments_without_common_crystals_are_refused(make):
    with pytest.raises(ResultsError, match="no test crystals in common"):
        compare([make("a", folds=(0,)), make("b", folds=(1,))])


def test_experiments_on_other_targets_are_refused_by_crystal(make):
    def shift(table):
        return dataclasses.replace(table, y_true=table.y_true + 0.5)

    with pytest.raises(ResultsError, match="different targets for 40 crystals, such as x-0-0000"):
        compare([make("a"), make("b", change=shift)])


def test_three_experiments_make_three_pairs(make):
    comparison = compare([make("a"), make("b", seed=1), make("c", seed=2)])
    assert [(pair.a, pair.b) for pair in comparison.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_two_runs_of_one_name_are_distinguished_by_their_day(make, tmp_path):
    a = make("a")
    later = Recorded(a.folder, {**a.content, "run": {**a.content["run"], "enqueued_on": "2026-12-24"}})
    assert compare([a, later]).labels == ("a (2026-11-20)", "a (2026-12-24)")


def test_one_experiment_alone_is_refused(make):
    with pytest.raises(UsageError, match="at least two experiments"):
        compare([make("a")])
