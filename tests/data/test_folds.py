"""Folds are matbench's; every random choice is a pure function of its seeds."""

from __future__ import annotations

import numpy as np
import pytest
from official_folds import SHARE_OF_METALS, dealt, matbench_splits, mixture, official_folds

from mbqueue.data import folds
from mbqueue.errors import DataError
from mbqueue.experiment import DataSpec, Spec
from mbqueue.task import TASKS


@pytest.fixture(scope="module", name="splits")
def shipped_splits() -> dict[str, dict[str, dict[str, list[str]]]]:
    return matbench_splits()


REGRESSIONS = [task for task in TASKS.values() if not task.target.is_class]


@pytest.mark.parametrize("task", REGRESSIONS, ids=lambda task: task.dataset)
def test_folds_of_a_regression_task_are_those_that_matbench_ships(splits, task):
    for fold in range(5):
        official = splits[task.dataset][f"fold_{fold}"]
        test, train = (set(map(task.id_of, rows(task.n, fold))) for rows in (folds.test_rows, folds.train_rows))
        assert test == set(official["test"])
        assert train == set(official["train"])


def test_folds_of_the_class_task_are_dealt_out_class_by_class_as_matbench_ships_them(splits):
    """Check that matbench's folds interleave the folds that mbqueue's rule gives to each class.

    The tests do not have the real classes, but wrong folds would pass this check only by an impossible coincidence.
    """
    [task] = [task for task in TASKS.values() if task.target.is_class]
    official = official_folds(task, splits)
    ones = round(SHARE_OF_METALS * task.n)
    found = [
        mixture(official, dealt(first, task.n), dealt(task.n - first, task.n, after=first))
        for first in (ones, task.n - ones)
    ]
    assert sum(one is not None for one in found) == 1
    assert mixture(official[::-1], dealt(ones, task.n), dealt(task.n - ones, task.n, after=ones)) is None


@pytest.mark.parametrize("n", [11, 700, 10_001])
@pytest.mark.parametrize("share", [0.5, 0.07])
def test_stratified_folds_of_any_size_are_those_of_scikit_learn(n, share):
    from sklearn.model_selection import StratifiedKFold

    classes = (np.random.default_rng(n).random(n) < share).astype(float)
    classes[:5], classes[5:10] = 1.0, 0.0
    split = StratifiedKFold(5, shuffle=True, random_state=18012019).split(np.zeros(n), classes)
    for fold, (train, test) in enumerate(split):
        np.testing.assert_array_equal(folds.test_rows(n, fold, classes=classes), test)
        np.testing.assert_array_equal(folds.train_rows(n, fold, classes=classes), train)


def test_a_validation_part_has_its_share_of_each_class():
    classes = (np.arange(1000) % 10 == 0).astype(float)
    rows = folds.train_rows(1000, 2, classes=classes)
    train, validation = folds.validation_split(rows, 0.1, seed=3, fold=2, classes=classes)
    assert sorted([*train, *validation]) == rows.tolist()
    assert (len(validation), classes[validation].sum()) == (80, 8)


@pytest.mark.parametrize("n", [5, 7, 699, 10_001])
def test_folds_of_any_size_are_those_of_scikit_learn(n):
    from sklearn.model_selection import KFold

    for fold, (train, test) in enumerate(KFold(5, shuffle=True, random_state=18012019).split(np.arange(n))):
        np.testing.assert_array_equal(folds.test_rows(n, fold), test)
        np.testing.assert_array_equal(folds.train_rows(n, fold), train)


def test_too_few_crystals_for_five_folds_are_refused():
    with pytest.raises(DataError, match="4 crystals cannot be split"):
        folds.test_rows(4, 0)


def test_the_validation_part_is_a_share_of_the_training_part_and_nothing_is_lost():
    rows = folds.train_rows(1000, 2)
    train, validation = folds.validation_split(rows, 0.05, seed=3, fold=2)
    assert len(validation) == 40
    assert sorted([*train, *validation]) == rows.tolist()
    assert not set(validation) & set(folds.test_rows(1000, 2))


def test_the_validation_part_depends_on_seed_and_fold_only():
    rows = np.arange(500)
    first = folds.validation_split(rows, 0.1, seed=1, fold=0)[1]
    np.testing.assert_array_equal(first, folds.validation_split(rows, 0.1, seed=1, fold=0)[1])
    assert first.tolist() != folds.validation_split(rows, 0.1, seed=2, fold=0)[1].tolist()
    assert first.tolist() != folds.validation_split(rows, 0.1, seed=1, fold=1)[1].tolist()


def test_one_row_cannot_be_split():
    with pytest.raises(DataError, match="is too small to split off a validation set"):
        folds.validation_split(np.arange(1), 0.5, seed=0, fold=0)


def test_the_order_of_an_epoch_depends_on_seed_fold_and_epoch_only():
    rows = np.arange(100, 200)
    order = folds.epoch_order(rows, seed=1, fold=2, epoch=3)
    assert sorted(order) == rows.tolist()
    np.testing.assert_array_equal(order, folds.epoch_order(rows, seed=1, fold=2, epoch=3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert order.tolist() != folds.epoch_order(rows, *other).tolist()


def batches_of(n: int = 1000, **options) -> list[np.ndarray]:
    sizes = np.random.default_rng(0).lognormal(7, 1, size=2 * n).astype(np.int64)
    values = {"seed": 1, "fold": 2, "epoch": 3, "sizes": sizes, **options}
    return folds.epoch_batches(np.arange(n, 2 * n), 30, **values)


def test_plain_batches_are_the_order_of_the_epoch_cut():
    batches = batches_of(sizes=None)
    assert [len(batch) for batch in batches] == [30] * 33 + [10]
    np.testing.assert_array_equal(np.concatenate(batches), folds.epoch_order(np.arange(1000, 2000), 1, 2, 3))


@pytest.mark.parametrize("n", [1, 29, 30, 31, 990, 1000])
def test_batches_grouped_by_size_hold_each_row_once_and_at_most_one_is_short(n):
    batches = batches_of(n)
    assert sorted(np.concatenate(batches)) == list(range(n, 2 * n))
    assert sorted(len(batch) for batch in batches) == sorted([30] * (n // 30) + ([n % 30] if n % 30 else []))


def test_batches_grouped_by_size_depend_on_seed_fold_and_epoch_only():
    first = [batch.tolist() for batch in batches_of()]
    assert first == [batch.tolist() for batch in batches_of()]
    for other in ({"seed": 2}, {"fold": 3}, {"epoch": 4}):
        assert first != [batch.tolist() for batch in batches_of(**other)]


def test_crystals_of_a_grouped_batch_are_of_a_size_and_batches_come_in_any_order():
    sizes = np.random.default_rng(0).lognormal(7, 1, size=2000).astype(np.int64)

    def spread(batches: list[np.ndarray]) -> float:
        return float(np.median([np.log(sizes[batch]).std() for batch in batches if len(batch) == 30]))

    grouped = batches_of(sizes=sizes)
    assert spread(grouped) < 0.2 * spread(batches_of(sizes=None))
    means = [np.log(sizes[batch]).mean() for batch in grouped]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_draws_are_the_same_with_every_version_of_numpy():
    # Compare with recorded values, because any change would silently redraw every validation set.
    assert folds.epoch_order(np.arange(8), seed=0, fold=0, epoch=1).tolist() == EPOCH
    assert folds.validation_split(np.arange(20), 0.2, seed=0, fold=0)[1].tolist() == VALIDATION
    assert folds.drawn_rows(20, 4, seed=0).tolist() == DRAWN


EPOCH = [5, 7, 1, 4, 3, 0, 2, 6]
VALIDATION = [5, 8, 11, 19]
DRAWN = [5, 9, 15, 18]


@pytest.mark.parametrize("n", [1, 4])
def test_too_few_crystals_for_the_folds_are_refused(n):
    with pytest.raises(DataError, match=f"{n} crystals? cannot be split into 5 folds"):
        folds.check_folds(np.arange(float(n)), 0.05)


def test_five_crystals_are_enough_for_all_folds():
    folds.check_folds(np.arange(5.0), 0.05)


def test_a_limit_below_the_number_of_folds_is_no_experiment():
    with pytest.raises(ValueError, match="3 crystals cannot be split into 5 folds"):
        Spec(name="few", data=DataSpec(limit=3))


def test_a_constant_target_is_refused():
    with pytest.raises(DataError, match=r"The target is 1\.5 for all 10 crystals"):
        folds.check_folds(np.full(10, 1.5), 0.05)


@pytest.mark.parametrize("ones", [0, 4, 20])
def test_too_few_crystals_of_a_class_are_refused(ones):
    with pytest.raises(DataError, match=f"Class 1 has {ones} crystals? and class 0 has {20 - ones}"):
        folds.check_folds((np.arange(20) < ones).astype(float), 0.05, is_class=True)
