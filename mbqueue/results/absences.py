"""Report elements that occur in a fold's test set but not in its training set.

Models make poor predictions for elements that they were not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbqueue.results.report.elements import elements_of
from mbqueue.results.tables import Predictions
from mbqueue.task import Target

#: The contribution of an absent element to predictions (see `mbqueue.train.references`), by kind of target.
_VALUES = {
    "energy": "a reference energy of 0",
    "scalar": "the mean of the training targets as its reference value",
    "class": "the log-odds of the training set as its reference value",
}


def absences(
    folds: Mapping[str, Mapping[str, Any]], predictions: Mapping[int, Predictions], target: Target
) -> list[str]:
    """Write one sentence for each group of folds whose training sets are missing the same elements.

    Elements that do not occur in a fold's test set are ignored.

    Args:
        folds: the key ``folds`` of results.json, with the ``absent_elements`` of each fold's training set.
        predictions: fold → predictions of its test set.
    """
    missing: dict[tuple[str, ...], list[str]] = {}
    for fold, entry in folds.items():
        tested = frozenset[str]().union(*map(elements_of, set(predictions[int(fold)].compositions)))
        if elements := tuple(element for element in entry["absent_elements"] if element in tested):
            missing.setdefault(elements, []).append(fold)
    return [_sentence(numbers, elements, target) for elements, numbers in missing.items()]


def _sentence(folds: list[str], elements: tuple[str, ...], target: Target) -> str:
    has = f"Fold {folds[0]} has" if len(folds) == 1 else f"Folds {', '.join(folds)} have"
    it = "it" if len(elements) == 1 else "each"
    return (
        f"{has} no training crystals with {', '.join(elements)}, so {it} has {_VALUES[target.kind]}. "
        f"Predictions for test crystals with {'this element' if len(elements) == 1 else 'these elements'} are poor."
    )
