"""Why and how a session ended. Imports no torch, so that the starting process can read it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """How a session ended."""

    DONE = "nothing is left to do"
    STOPPED = "stopped with work left"
    BLOCKED = "what is left waits for a person: jobs failed or are paused, or a search cannot begin a trial"


class StopKind(Enum):
    """What ends a session, for programs; `StopCause` has the words."""

    EXHAUSTED = "exhausted"
    """Nothing is left that it could do."""
    TIME = "time"
    """Its time is up."""
    SIGNAL = "signal"
    """It was sent a signal."""
    ASKED = "asked"
    """Its caller asked for the end, or stopped listening."""
    LIMIT = "limit"
    """It reached its limit of jobs."""
    IDLE = "idle"
    """It could claim nothing for as long as it should wait."""
    OTHERS = "others"
    """What is left is being done by sessions elsewhere."""
    DEVICE_LOST = "device lost"
    """Its GPU stopped working."""


@dataclass(frozen=True)
class StopCause:
    """Why a session stops.

    Attributes:
        kind: what programs decide on.
        reason: the same in words, for people.
        signal: number of the signal that asked for it, of a SIGNAL.
    """

    kind: StopKind
    reason: str
    signal: int | None = None

    @classmethod
    def by_signal(cls, number: int) -> StopCause:
        """A signal was sent."""
        return cls(StopKind.SIGNAL, signal.Signals(number).name, number)

    @classmethod
    def by_lost_device(cls, why: str) -> StopCause:
        """The GPU stopped working, and said so."""
        return cls(StopKind.DEVICE_LOST, f"the GPU stopped working ({why})")


TIME_IS_UP = StopCause(StopKind.TIME, "the session's time is up")


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """What a session did.

    Attributes:
        cause: why it ended.
        jobs_done: jobs that it committed.
    """

    session: str
    ending: Ending
    cause: StopCause
    jobs_done: int

    @property
    def reason(self) -> str:
        """Why it ended, in words."""
        return self.cause.reason
