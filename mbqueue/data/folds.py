"""Choose each fold's crystals for training, validation and test, and their order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import DataError, counted
from mbqueue.task import N_FOLDS

#: Crystals are sorted by size within windows of this many batches. With small windows, each batch stays a random
#: sample of crystals of similar size.
_WINDOW = 16

#: The seed of matbench's folds (matbench.constants), which are scikit-learn's ``KFold(5, shuffle=True)``.
_MATBENCH_SEED = 18012019


def check_folds(targets: NDArray[np.float64], share: float, *, is_class: bool = False) -> None:
    """Check that targets, [N], are not all equal, and that every fold has test, training and validation crystals.

    Raises:
        DataError: if a check fails.
    """
    n = len(targets)
    if is_class:
        ones = int(np.count_nonzero(targets))
        if min(ones, n - ones) < N_FOLDS:
            raise DataError(
                f"Class 1 has {counted(ones, 'crystal')} and class 0 has {n - ones}, but {N_FOLDS} folds need at "
                f"least {N_FOLDS} crystals of each class. Add crystals of the rarer class, or check that the target "
                "column is the right one."
            )
    elif n >= N_FOLDS and (targets == targets[0]).all():
        raise DataError(
            f"The target is {targets[0]:g} for all {n} crystals, so there is nothing to learn. Check that the "
            "target column is the right one."
        )
    for fold in range(N_FOLDS):
        classes = targets if is_class else None
        validation_split(train_rows(n, fold, classes=classes), share, 0, fold, classes=classes)


def smallest_validation_set(
    targets: NDArray[np.float64], share: float, folds: Iterable[int], *, is_class: bool = False
) -> int:
    """The number of crystals in the smallest validation set of some folds. It does not depend on the seed."""
    n, classes = len(targets), targets if is_class else None
    return min(
        len(validation_split(train_rows(n, fold, classes=classes), share, 0, fold, classes=classes)[1])
        for fold in folds
    )


def test_rows(  # despite its name, this is not a pytest test
    n: int,
    fold: int,
    *,
    classes: NDArray[np.float64] | None = None,  # noqa: PT028
) -> NDArray[np.int64]:
    """The rows of a fold's test set, ascending. ``fold`` is 0 to 4, and the dataset has ``n`` crystals.

    Without ``classes``, the split equals that of scikit-learn's ``KFold``: shuffle the rows with ``RandomState(seed)``,
    and cut them into five parts, of which the first n mod 5 have one more row.

    With ``classes`` [N], the split equals that of ``StratifiedKFold``: dealing the sorted classes to the folds in turn
    gives each fold's number of crystals per class. A shuffle then decides which crystals of a class go to which fold.

    Raises:
        DataError: if there are fewer crystals than folds.
    """
    if n < N_FOLDS:
        raise DataError(
            f"{counted(n, 'crystal')} cannot be split into {N_FOLDS} folds. Use at least {N_FOLDS} crystals."
        )
    if not 0 <= fold < N_FOLDS:
        raise ValueError(f"fold {fold} is not one of 0 to {N_FOLDS - 1}")
    if classes is not None:
        return np.flatnonzero(_stratified(classes) == fold)
    shuffled = np.arange(n)
    np.random.RandomState(_MATBENCH_SEED).shuffle(shuffled)
    sizes = np.full(N_FOLDS, n // N_FOLDS)
    sizes[: n % N_FOLDS] += 1
    stop = int(sizes[: fold + 1].sum())
    return np.sort(shuffled[stop - sizes[fold] : stop])


def _stratified(classes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The fold whose test set contains each crystal, [N]."""
    values, firsts = np.unique(classes, return_index=True)
    generator = np.random.RandomState(_MATBENCH_SEED)
    in_order = values[np.argsort(firsts)]  # scikit-learn numbers classes by first appearance
    dealt = np.repeat(np.arange(len(in_order)), [np.count_nonzero(classes == value) for value in in_order])
    fold_of = np.empty(len(classes), np.int64)
    for number, value in enumerate(in_order):
        counts = [np.count_nonzero(dealt[fold::N_FOLDS] == number) for fold in range(N_FOLDS)]
        folds = np.repeat(np.arange(N_FOLDS), counts)
        generator.shuffle(folds)
        fold_of[classes == value] = folds
    return fold_of


def train_rows(n: int, fold: int, *, classes: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """Rows of the training set of ``fold``: all rows outside its test set, ascending."""
    return np.setdiff1d(np.arange(n), test_rows(n, fold, classes=classes), assume_unique=True)


def validation_split(
    rows: NDArray[np.int64], share: float, seed: int, fold: int, *, classes: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a fold's training set into rows for training and rows for validation, both ascending.

    ``share`` is the fraction of the rows that become the validation set. Training set and validation set each contain
    at least one row. If you pass ``classes``, with one value per row of the dataset, each class is split separately.

    Raises:
        DataError: if there are fewer than two rows or, with ``classes``, fewer than two rows of a class.
    """
    if len(rows) < 2:
        raise DataError(
            f"A training set of {counted(len(rows), 'crystal')} is too small to split off a validation set. Use more "
            "crystals."
        )
    if classes is not None:
        of_class = [rows[classes[rows] == value] for value in np.unique(classes[rows])]
        parts = [validation_split(part, share, seed, fold) for part in of_class]
        return np.sort(np.concatenate([a for a, _ in parts])), np.sort(np.concatenate([b for _, b in parts]))
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    order = _generator("validation", seed, fold).permutation(len(rows))
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def epoch_order(rows: NDArray[np.int64], seed: int, fold: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle ``rows`` into the order for epoch ``epoch`` (from 1) of ``fold``."""
    return rows[_generator("order", seed, fold, epoch).permutation(len(rows))]


def epoch_batches(
    rows: NDArray[np.int64],
    batch_size: int,
    seed: int,
    fold: int,
    epoch: int,
    *,
    sizes: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """The batches of epoch ``epoch`` of ``fold``; each of ``rows`` is in exactly one batch.

    By default, ``epoch_order`` is cut into batches; the last batch may be smaller than ``batch_size``. If you pass
    ``sizes``, with one value per row of the dataset, each batch has crystals of similar size. To group crystals by
    size, the function sorts windows of 16 batches by size, and then shuffles the batches. A batch that is smaller than
    ``batch_size`` is not sorted, and can be at any position.
    """
    order = epoch_order(rows, seed, fold, epoch)
    whole = len(order) - len(order) % batch_size
    if sizes is not None:
        for begin in range(0, whole, _WINDOW * batch_size):
            window = order[begin : min(begin + _WINDOW * batch_size, whole)]
            window[:] = window[np.argsort(sizes[window], kind="stable")]
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    if sizes is None:
        return batches
    return [batches[position] for position in _generator("batches", seed, fold, epoch).permutation(len(batches))]


def drawn_rows(n: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Choose ``limit`` of ``n`` rows at random, ascending; return all rows if ``limit`` is 0 or at least ``n``."""
    if limit <= 0 or limit >= n:
        return np.arange(n)
    return np.sort(_generator("limit", seed).permutation(n)[:limit])


def _generator(purpose: str, *numbers: int) -> np.random.RandomState:
    """A random number generator for one purpose; generators for different purposes or numbers are independent.

    Every version of NumPy gives the same validation set, because NumPy guarantees that the streams of a
    ``RandomState`` never change. The streams of a ``Generator`` may change.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*purpose.encode(), 256, *numbers])))
