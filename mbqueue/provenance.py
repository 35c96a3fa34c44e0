"""Spec sections that record where a spec comes from: a search, `promote`, `blend` or `predict-again`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mbqueue.project import NAME_PATTERN
from mbqueue.section import Section

#: Spec keys that only mbqueue's commands set, and that users cannot set in an experiment file.
KEPT_BY_COMMANDS = ("trial", "chosen", "made_from")


class Released(Section):
    """What remains of a pruned trial after its checkpoints were removed.

    Attributes:
        at: time at which the checkpoints were discarded, as a Unix timestamp.
        why: the reason for pruning.
        histories: the history of each fold, with one row per finished epoch.
    """

    at: float = Field(strict=False)
    why: str
    histories: dict[str, list[dict[str, Any]]]


class TrialOf(Section):
    """The section that a search adds to the spec of each trial (`mbqueue.search`).

    Attributes:
        search: the whole search, as plain JSON values.
        number: the trial's number, from 0.
        settings: dotted key → the trial's value, for each key that the search varies.
        kept: whether a user has resumed the trial after it was pruned. mbqueue never prunes such a trial again.
        released: what remains of the trial if its checkpoints have been removed; else None.
    """

    search: dict[str, Any]
    number: int = Field(ge=0)
    settings: dict[str, Any]
    kept: bool = False
    released: Released | None = None


class Member(Section):
    """A recorded experiment that a blend or a repeated prediction uses.

    Attributes:
        experiment: the member's name in the queue.
        spec: the member's whole spec, as plain JSON values.
    """

    experiment: str = Field(pattern=NAME_PATTERN)
    spec: dict[str, Any]


class MadeFrom(Section):
    """The section that `blend` and `predict-again` add to the new experiment's spec.

    Attributes:
        members: the experiments to blend, or the one experiment whose models predict again.
        weights: how a blend weights its members: equally, or with weights fitted on their validation sets. None if
            the experiment is not a blend.
    """

    members: Annotated[tuple[Member, ...], Field(min_length=1, strict=False)]
    weights: Literal["mean", "fitted"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> MadeFrom:
        if (self.weights is None) != (len(self.members) == 1):
            raise ValueError("a blend needs weights and at least two members; without weights, give one member")
        return self


class Choice(Section):
    """The section that `promote` adds to the new experiment's spec.

    Attributes:
        search: name of the search that found these settings.
        trial: number of the best trial.
        trials: number of trials that were compared.
        folds: the folds on whose validation sets the trials were compared.
    """

    search: str
    trial: int
    trials: int
    folds: list[int]
