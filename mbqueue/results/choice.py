"""Folds on which the settings of an experiment were chosen: their scores are marked wherever they are shown.

A search compares trials by their validation MAE, and `promote` enqueues the best one. Of the folds of the trials, that
validation MAE is the lowest of many. Their test parts took no part in it. A blend has the marks of its members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Stands behind the number of such a fold, or its score; the second where a terminal knows ASCII alone.
MARK, ASCII_MARK = "†", "*"


def chosen_on(spec: Mapping[str, Any]) -> tuple[int, ...]:
    """The folds on which the settings of a spec (plain JSON values) were chosen; none for most experiments."""
    return tuple(sorted({fold for choice in _choices(spec) for fold in choice["folds"]}))


def marked(fold: int | str, spec: Mapping[str, Any], mark: str = MARK) -> str:
    """The number of a fold, with the mark where it took part in the choice."""
    return f"{fold} {mark}" if int(fold) in chosen_on(spec) else str(fold)


def choice_note(spec: Mapping[str, Any], mark: str = MARK) -> str:
    """What the mark means, in a few sentences; empty where no fold has it."""
    choices = _choices(spec)
    if not choices:
        return ""
    said = " ".join(
        f"Trial {choice['trial']} was the best of {choice['trials']} of the search {choice['search']} by the "
        f"validation MAE of {_folds(choice['folds'])}."
        for choice in choices
    )
    folds = _folds(chosen_on(spec))
    return (
        f"{mark} {folds.capitalize()} took part in the choice of these settings. {said} So that validation MAE is too "
        f"good. The test crystals of {folds} took no part; those of the other folds were among the crystals that the "
        "trials were trained and validated on."
    )


def _choices(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What `promote` keeps, of the experiment and of those that it is made from, each once."""
    members = (spec.get("made_from") or {}).get("members", ())
    of_members = [choice for member in members for choice in _choices(member["spec"])]
    # A blend has the mark of its members, with the folds of all; which search chose what, they say themselves.
    found = of_members or ([spec["chosen"]] if spec.get("chosen") else [])
    return [choice for place, choice in enumerate(found) if choice not in found[:place]]


def _folds(folds: list[int] | tuple[int, ...]) -> str:
    return f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}"
