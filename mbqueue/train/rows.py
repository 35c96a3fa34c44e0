"""Select the dataset rows of each part of a fold: training, validation and test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.folds import test_rows, train_rows, validation_split
from mbqueue.experiment import Spec
from mbqueue.train.feeds import Rows


@dataclass(frozen=True, kw_only=True)
class FoldRows:
    """The dataset rows that a fold uses for training, validation and test; ascending and disjoint."""

    train: Rows
    validation: Rows
    test: Rows


def split_rows(targets: NDArray[np.float64], spec: Spec, fold: int) -> FoldRows:
    """Split a dataset's rows into a fold's training, validation and test set.

    If ``train.epochs`` is 0, the validation set is empty.
    """
    n, classes = len(targets), targets if spec.predicts.is_class else None
    outer = train_rows(n, fold, classes=classes)
    train, validation = outer, outer[:0]
    if spec.train.epochs:
        own = spec.train.validation_seed
        seed = spec.seed if own < 0 else own
        train, validation = validation_split(outer, spec.train.validation, seed, fold, classes=classes)
    return FoldRows(train=train, validation=validation, test=test_rows(n, fold, classes=classes))


def common_validation(targets: NDArray[np.float64], specs: Iterable[Spec], fold: int) -> Rows:
    """Return the validation rows that all experiments have in common, ascending.

    Args:
        targets: target of every crystal of the dataset, [N]; the values affect the split only if they are classes.
    """
    parts = [split_rows(targets, spec, fold).validation for spec in specs]
    return reduce(partial(np.intersect1d, assume_unique=True), parts)
