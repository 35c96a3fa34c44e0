"""Mark the scores of folds on which an experiment's settings were chosen.

A search compares trials by their validation MAE, and `promote` enqueues the settings of the best trial. The validation
MAE of the best trial is the lowest of many, so it is too optimistic. When a trial trains on a fold, it does not use the
fold's test set, but it uses crystals from the test sets of the other folds. A fold of a blend gets the mark if the same
fold is marked in any member of the blend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbqueue.errors import counted
from mbqueue.results.members import members_in

#: The mark that follows a fold's number or score if the settings were chosen on this fold, and the same mark for ASCII
#: terminals.
MARK, ASCII_MARK = "†", "*"


def chosen_on(spec: Mapping[str, Any]) -> tuple[int, ...]:
    """The folds on which the settings of a spec (plain JSON values) were chosen; empty for most experiments."""
    return tuple(sorted({fold for choice in _choices(spec) for fold in choice["folds"]}))


def marked(fold: int | str, spec: Mapping[str, Any], mark: str = MARK) -> str:
    """Format the number of a fold, followed by the mark if the settings were chosen on this fold."""
    return f"{fold} {mark}" if int(fold) in chosen_on(spec) else str(fold)


def choice_note(spec: Mapping[str, Any], mark: str = MARK) -> str:
    """Return a short explanation of the marks on folds; empty if no fold is marked."""
    choices = _choices(spec)
    if not choices:
        return ""
    said = " ".join(
        f"Trial {choice['trial']} had the lowest validation MAE on {_folds(choice['folds'])} among the "
        f"{counted(choice['trials'], 'trial')} of the search {choice['search']}."
        for choice in choices
    )
    folds = _folds(chosen_on(spec))
    unused = f"The search did not use the test crystals of {folds}."
    if len(chosen_on(spec)) > 1:
        unused = "In training on each of these folds, the search did not use that fold's test crystals."
    return (
        f"{mark} These settings were chosen on {folds}. {said} The lowest of many validation "
        f"MAEs is too optimistic. {unused} The crystals for training and validation in the search "
        "include the test crystals of the other folds."
    )


def _choices(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Collect what `promote` recorded in the specs of the experiment and its members, without duplicates."""
    of_members = [choice for member in members_in(spec) for choice in _choices(member["spec"])]
    # For a blend, return the choices of all its members.
    found = of_members or ([spec["chosen"]] if spec.get("chosen") else [])
    return [choice for position, choice in enumerate(found) if choice not in found[:position]]


def _folds(folds: list[int] | tuple[int, ...]) -> str:
    return f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}"
