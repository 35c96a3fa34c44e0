"""Which rows of a dataset each part of a fold has."""

from __future__ import annotations

from dataclasses import dataclass

from mbqueue.data.folds import test_rows, train_rows, validation_split
from mbqueue.experiment import Spec
from mbqueue.train.feeds import Rows


@dataclass(frozen=True, kw_only=True)
class FoldRows:
    """Which rows of the dataset a fold trains on, validates on and is tested on; ascending, disjoint."""

    train: Rows
    validation: Rows
    test: Rows


def split_rows(n: int, spec: Spec, fold: int) -> FoldRows:
    """The fold's rows; nothing is held out for validation when there is no epoch to choose."""
    outer = train_rows(n, fold)
    train, validation = outer, outer[:0]
    if spec.train.epochs:
        train, validation = validation_split(outer, spec.train.validation, spec.seed, fold)
    return FoldRows(train=train, validation=validation, test=test_rows(n, fold))
