"""Why and how a session ended. Imports no torch, so that the process that starts sessions can import it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """The ending of a session."""

    DONE = "nothing is left to do"
    STOPPED = "stopped with work left"
    BLOCKED = "what is left waits for you: jobs failed or are paused, or a search cannot begin a trial"


class StopKind(Enum):
    """The kind of cause that ended a session, for programs; `StopCause` has the text."""

    EXHAUSTED = "exhausted"
    """Nothing is left to do."""
    TIME = "time"
    """The session's time is up."""
    SIGNAL = "signal"
    """The session received a signal."""
    ASKED = "asked"
    """The caller asked the session to stop, or stopped listening."""
    LIMIT = "limit"
    """The session reached its limit of jobs."""
    IDLE = "idle"
    """The session found nothing to claim within its idle time."""
    OTHERS = "others"
    """Sessions elsewhere hold the remaining jobs."""
    DEVICE_LOST = "device lost"
    """The session's GPU stopped working."""


@dataclass(frozen=True)
class StopCause:
    """Why a session stops.

    Attributes:
        kind: the kind, for programs.
        reason: the cause in words.
        signal: the signal's number, if ``kind`` is SIGNAL.
    """

    kind: StopKind
    reason: str
    signal: int | None = None

    @classmethod
    def by_signal(cls, number: int) -> StopCause:
        """The cause for a received signal."""
        return cls(StopKind.SIGNAL, signal.Signals(number).name, number)

    @classmethod
    def by_lost_device(cls, why: str) -> StopCause:
        """The cause for a GPU that stopped working."""
        return cls(StopKind.DEVICE_LOST, f"the GPU stopped working ({why})")


TIME_IS_UP = StopCause(StopKind.TIME, "the session's time is up")


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """The outcome of a session.

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
        """Why the session ended, in words."""
        return self.cause.reason
