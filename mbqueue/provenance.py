"""The origin of a spec, which commands record in it: a search, a promotion, a blend. Files in jobs/ never have an
origin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mbqueue.project import NAME_PATTERN
from mbqueue.section import Section

#: The keys of a spec that only commands write.
KEPT_BY_COMMANDS = ("trial", "chosen", "made_from")


class Released(Section):
    """The record of a pruned trial whose checkpoints were removed.

    Attributes:
        at: time of pruning, seconds since the epoch.
        why: the reason for pruning.
        histories: fold → one row per finished epoch.
    """

    at: float = Field(strict=False)
    why: str
    histories: dict[str, list[dict[str, Any]]]


class TrialOf(Section):
    """The part that a search adds to the spec of each trial (`mbqueue.search`).

    Attributes:
        search: the whole search, as plain JSON values.
        number: the trial's number, from 0.
        settings: dotted key → value, for the keys that the search varies.
        kept: whether a user resumed the trial after pruning, so that it is not pruned again.
        released: set once the trial's checkpoints were discarded.
    """

    search: dict[str, Any]
    number: int = Field(ge=0)
    settings: dict[str, Any]
    kept: bool = False
    released: Released | None = None


class Member(Section):
    """A member: an experiment whose recorded results go into another experiment.

    Attributes:
        experiment: the member's name in the queue.
        spec: the member's whole spec, as plain JSON values.
    """

    experiment: str = Field(pattern=NAME_PATTERN)
    spec: dict[str, Any]


class MadeFrom(Section):
    """The part that `blend` and `predict-again` add to the spec of an experiment without training.

    Attributes:
        members: the experiments that are blended, or the one whose models predict again.
        weights: how a blend weights its members: equally, or fitted on their validation parts; None if the experiment
            is not a blend.
    """

    members: Annotated[tuple[Member, ...], Field(min_length=1, strict=False)]
    weights: Literal["mean", "fitted"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> MadeFrom:
        if (self.weights is None) != (len(self.members) == 1):
            raise ValueError("a blend needs weights and at least two members, others one member and no weights")
        return self


class Choice(Section):
    """The part that `promote` adds to the spec of an experiment.

    Attributes:
        search: the search with these best settings.
        trial: the best trial; trials: the number of trials.
        folds: the folds on whose validation parts the trials were compared.
    """

    search: str
    trial: int
    trials: int
    folds: list[int]
