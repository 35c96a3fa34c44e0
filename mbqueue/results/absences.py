"""Elements in a fold's test part that its training part lacks: crystals with them are predicted badly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbqueue.results.report.elements import elements_of
from mbqueue.results.tables import Predictions
from mbqueue.task import Target


def absences(
    folds: Mapping[str, Mapping[str, Any]], predictions: Mapping[int, Predictions], target: Target
) -> list[str]:
    """One sentence per set of folds that lack the same elements; elements in no test crystal are left out.

    Args:
        folds: as in results.json, with ``absent_elements`` of each fold's training part.
        predictions: fold → its test part.
    """
    missing: dict[tuple[str, ...], list[str]] = {}
    for fold, entry in folds.items():
        tested = frozenset[str]().union(*map(elements_of, set(predictions[int(fold)].compositions)))
        if elements := tuple(element for element in entry["absent_elements"] if element in tested):
            missing.setdefault(elements, []).append(fold)
    return [_sentence(numbers, elements, target) for elements, numbers in missing.items()]


def _sentence(folds: list[str], elements: tuple[str, ...], target: Target) -> str:
    which, theirs = ("Fold", "its") if len(folds) == 1 else ("Folds", "their")
    so = "the reference energy is 0" if target.kind == "energy" else "it counts as an average element"
    return (
        f"{which} {', '.join(folds)}: {', '.join(elements)} not in {theirs} training part, so {so} and test crystals "
        "with it are predicted badly."
    )
