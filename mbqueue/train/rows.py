"""Which rows of a dataset each part of a fold has."""

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
    """Which rows of the dataset a fold trains on, validates on and is tested on; ascending, disjoint."""

    train: Rows
    validation: Rows
    test: Rows


def split_rows(targets: NDArray[np.float64], spec: Spec, fold: int) -> FoldRows:
    """The fold's rows of a dataset with these targets, [N]; without epochs nothing is held out for validation."""
    n, classes = len(targets), targets if spec.predicts.is_class else None
    outer = train_rows(n, fold, classes=classes)
    train, validation = outer, outer[:0]
    if spec.train.epochs:
        own = spec.train.validation_seed
        seed = spec.seed if own < 0 else own
        train, validation = validation_split(outer, spec.train.validation, seed, fold, classes=classes)
    return FoldRows(train=train, validation=validation, test=test_rows(n, fold, classes=classes))


def common_validation(targets: NDArray[np.float64], specs: Iterable[Spec], fold: int) -> Rows:
    """Rows that are in the validation part of every experiment, so that none of them was trained on these; ascending.

    Args:
        targets: of every crystal of the dataset, [N]; the split depends on their values only for classes.
    """
    parts = [split_rows(targets, spec, fold).validation for spec in specs]
    return reduce(partial(np.intersect1d, assume_unique=True), parts)
