"""matbench's leaderboards, and the conditions for comparing a score with them."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mbqueue.families import Family
from mbqueue.results.members import enumerated, families_of, trained_specs, unknown_weights
from mbqueue.task import N_FOLDS, TASKS, Target

#: The published scores and their source, in a file that you can update.
FILE = Path(__file__).with_name("leaderboards.toml")

_SEEN = (
    "The other models on the leaderboard were trained only on the fold's training set. A better score from pretrained "
    "weights is therefore not evidence of better generalisation. Mention the pretraining wherever you show a score."
)
_ADVANTAGE = (
    "Models trained only on the fold's training set did not have this advantage. Mention the pretraining wherever you "
    "show a score."
)


def overlap_note(target: Target, spec: Mapping[str, Any], *, dataset: str) -> str:
    """Describe which of a dataset's crystals and targets the models saw in pretraining, judging by the dataset's name.

    For a blend of several families, the note describes each family.
    """
    notes = [_overlap_note(family, target, spec, dataset) for family in families_of(spec)]
    if unknown := unknown_weights(spec):
        notes.append(f"This version of mbqueue does not know what {enumerated(unknown)} saw in pretraining.")
    return " ".join(notes)


def _overlap_note(family: Family, target: Target, spec: Mapping[str, Any], dataset: str) -> str:
    may_have_seen = (
        f"{family.pretraining} It may have seen many of these crystals, including test crystals, {family.labels}"
    )
    if target.kind == "energy":
        if dataset in family.seen:
            return f"{family.pretraining} {family.seen[dataset]} {_SEEN}"
        return f"{may_have_seen}. These energies may be closely related to the target. {_ADVANTAGE}"
    if all(trained["model"]["trainable"] == "none" for trained in trained_specs(spec)):
        return (
            "This model uses only the composition of a crystal. The model was fitted on the fold's training set, "
            f"without {family.name}'s pretrained weights."
        )
    return f"{may_have_seen}, but never with this target. {_ADVANTAGE}"


@dataclass(frozen=True)
class Published:
    """An algorithm on a leaderboard, with its mean score over the five folds."""

    name: str
    score: float


def leaderboard(dataset: str) -> tuple[Published, ...]:
    """The published scores of a matbench task, best first; empty for other datasets."""
    return _boards().get(dataset, ())


def source() -> str:
    return str(tomllib.loads(FILE.read_text(encoding="utf-8"))["source"])


@cache
def _boards() -> dict[str, tuple[Published, ...]]:
    content = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {name: tuple(Published(**row) for row in content[name]["rows"]) for name in TASKS if name in content}


def reasons_against(*, dataset: str, official: bool, n: int, dropped: int, folds: Collection[int]) -> list[str]:
    """Why an experiment's mean score cannot be compared with the leaderboard; empty if it can."""
    reasons = []
    task = TASKS.get(dataset)
    if task is None:
        reasons.append("the crystals are not from the official file of a matbench task")
    elif not official:
        reasons.append(f"the crystals are not from the official file of {task.dataset}")
    elif n != task.n or dropped:
        reasons.append(f"only {n:,} of the {task.n:,} official crystals were used")
    missing = sorted(set(range(N_FOLDS)) - set(folds))
    if missing:
        several = len(missing) > 1
        numbers = ", ".join(map(str, missing))
        reasons.append(f"fold{'s' * several} {numbers} {'are' if several else 'is'} missing")
    return reasons
