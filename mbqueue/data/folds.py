"""Which crystals train, validate and test in a fold, and in which order. Pure functions, all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import DataError
from mbqueue.task import N_FOLDS

#: How many batches' crystals are sorted by size together: few enough that each batch stays a random draw of its size.
_WINDOW = 16

#: The seed of matbench's own folds (matbench.constants), which are scikit-learn's ``KFold(5, shuffle=True)``.
_MATBENCH_SEED = 18012019


def check_folds(targets: NDArray[np.float64], share: float, *, is_class: bool = False) -> None:
    """Raise ``DataError`` unless crystals with these targets, [N], make folds that all have a test part, a training
    part and a validation part of ``share``, and there is something to learn.
    """
    n = len(targets)
    if is_class:
        ones = int(np.count_nonzero(targets))
        if min(ones, n - ones) < N_FOLDS:
            raise DataError(
                f"{ones} of the {n} crystals are of class 1 and {n - ones} of class 0, and {N_FOLDS} folds need "
                f"{N_FOLDS} of each. Give more of the rarer one, or check that the right column is the target."
            )
    elif n >= N_FOLDS and (targets == targets[0]).all():
        raise DataError(
            f"The target is {targets[0]:g} for all {n} crystals: there is nothing to learn. Check that the right "
            "column is the target."
        )
    for fold in range(N_FOLDS):
        classes = targets if is_class else None
        validation_split(train_rows(n, fold, classes=classes), share, 0, fold, classes=classes)


def test_rows(  # no test of pytest's
    n: int,
    fold: int,
    *,
    classes: NDArray[np.float64] | None = None,  # noqa: PT028
) -> NDArray[np.int64]:
    """Rows of the test part of ``fold`` (0–4) of a data set of ``n`` crystals, ascending.

    scikit-learn's rules. ``KFold``: shuffle 0 … n−1 with ``RandomState(seed)``, cut into five runs of which the first
    n mod 5 are one longer, sort each. ``StratifiedKFold``, for ``classes`` [N]: deal the sorted classes out to the
    folds in turn, which gives how many of each class a fold has; then shuffle which crystals these are, class by class.

    Raises:
        DataError: if there are fewer crystals than folds.
    """
    if n < N_FOLDS:
        raise DataError(f"{n} crystals cannot be split into {N_FOLDS} folds. Give at least {N_FOLDS}.")
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
    """The fold of whose test part each crystal is, [N]."""
    values, firsts = np.unique(classes, return_index=True)
    generator = np.random.RandomState(_MATBENCH_SEED)
    in_order = values[np.argsort(firsts)]  # scikit-learn numbers classes by where each is met first
    dealt = np.repeat(np.arange(len(in_order)), [np.count_nonzero(classes == value) for value in in_order])
    fold_of = np.empty(len(classes), np.int64)
    for number, value in enumerate(in_order):
        counts = [np.count_nonzero(dealt[fold::N_FOLDS] == number) for fold in range(N_FOLDS)]
        folds = np.repeat(np.arange(N_FOLDS), counts)
        generator.shuffle(folds)
        fold_of[classes == value] = folds
    return fold_of


def train_rows(n: int, fold: int, *, classes: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """Rows of the training part of ``fold``: all that are not in its test part, ascending."""
    return np.setdiff1d(np.arange(n), test_rows(n, fold, classes=classes), assume_unique=True)


def validation_split(
    rows: NDArray[np.int64], share: float, seed: int, fold: int, *, classes: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A fold's training part cut in two: what trains, and the ``share`` that chooses the best epoch; both ascending.

    At least one row goes to each. With ``classes`` (of every row of the data set), each class is cut so.

    Raises:
        DataError: if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"A training part of {len(rows)} crystals cannot give any to validation. Give more crystals.")
    if classes is not None:
        of_class = [rows[classes[rows] == value] for value in np.unique(classes[rows])]
        parts = [validation_split(part, share, seed, fold) for part in of_class]
        return np.sort(np.concatenate([a for a, _ in parts])), np.sort(np.concatenate([b for _, b in parts]))
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    order = _generator("validation", seed, fold).permutation(len(rows))
    return np.sort(rows[order[count:]]), np.sort(rows[order[:count]])


def epoch_order(rows: NDArray[np.int64], seed: int, fold: int, epoch: int) -> NDArray[np.int64]:
    """``rows`` in the order in which epoch ``epoch`` (1 is the first) of ``fold`` sees them."""
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
    """The batches of epoch ``epoch`` of ``fold``, each of ``rows`` once.

    Plainly they are ``epoch_order``, cut; the last one may be short. With ``sizes`` (of every row of the data set)
    each is of crystals of similar size: the order is sorted by size within windows of 16 batches, cut, and the batches
    are shuffled. The short one, of crystals of any size, then stands anywhere.
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
    return [batches[place] for place in _generator("batches", seed, fold, epoch).permutation(len(batches))]


def drawn_rows(n: int, limit: int, seed: int) -> NDArray[np.int64]:
    """``limit`` of ``n`` rows drawn with ``seed``, ascending; all of them when ``limit`` is 0 or not below ``n``."""
    if limit <= 0 or limit >= n:
        return np.arange(n)
    return np.sort(_generator("limit", seed).permutation(n)[:limit])


def _generator(purpose: str, *numbers: int) -> np.random.RandomState:
    """A generator for one purpose: streams of different purposes or numbers have nothing in common.

    ``RandomState`` and not ``Generator``, because NumPy promises that the former's streams never change: a session
    with another NumPy must not find another validation part.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*purpose.encode(), 256, *numbers])))
