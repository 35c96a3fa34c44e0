"""What commands keep in a spec of where it comes from: a search, a promotion, a blend. No file in jobs/ has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mbqueue.project import NAME_PATTERN
from mbqueue.section import Section

#: The keys that only commands write, if a spec has them.
KEPT_BY_COMMANDS = ("trial", "chosen", "made_from")


class Released(Section):
    """What is kept of a pruned trial whose checkpoints were removed.

    Attributes:
        at: when, in seconds since the epoch.
        why: it was pruned.
        histories: fold → one row per finished epoch.
    """

    at: float = Field(strict=False)
    why: str
    histories: dict[str, list[dict[str, Any]]]


class TrialOf(Section):
    """What a search keeps in the spec of each of its trials (`mbqueue.search`).

    Attributes:
        search: the whole search, as plain JSON values.
        number: the trial's number, from 0.
        settings: dotted key → value, for the keys that the search varies.
        kept: a person has resumed it after it was pruned, so it is not pruned again.
        released: set once its checkpoints were given up.
    """

    search: dict[str, Any]
    number: int = Field(ge=0)
    settings: dict[str, Any]
    kept: bool = False
    released: Released | None = None


class Member(Section):
    """An experiment whose recorded results another one is made from.

    Attributes:
        experiment: its name in the queue.
        spec: its whole spec, as plain JSON values.
    """

    experiment: str = Field(pattern=NAME_PATTERN)
    spec: dict[str, Any]


class MadeFrom(Section):
    """What `blend` and `predict-again` keep in the spec of an experiment that trains nothing.

    Attributes:
        members: the experiments that are blended, or the one whose models predict again.
        weights: how a blend weighs its members: equally, or as fitted on their validation parts; None for no blend.
    """

    members: Annotated[tuple[Member, ...], Field(min_length=1, strict=False)]
    weights: Literal["mean", "fitted"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> MadeFrom:
        if (self.weights is None) != (len(self.members) == 1):
            raise ValueError("a blend has weights and at least two members; another has neither")
        return self


class Choice(Section):
    """What `promote` keeps in the spec of an experiment.

    Attributes:
        search: whose best settings these are.
        trial: that had them; trials: how many there were.
        folds: on whose validation parts the trials were compared.
    """

    search: str
    trial: int
    trials: int
    folds: list[int]
