"""Why and how a session ended.

This module does not import torch, so the process that starts sessions can import this module quickly.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """How a session ended, and whether work is left."""

    DONE = "nothing is left to do"
    STOPPED = "stopped with work left"
    BLOCKED = "the remaining work needs your attention"


class StopKind(Enum):
    """Why a session ended, as a value for programs. `StopCause` adds an explanation for users."""

    EXHAUSTED = "exhausted"
    """Nothing is left to do."""
    TIME = "time"
    """The session's time is up."""
    SIGNAL = "signal"
    """The session received a signal."""
    ASKED = "asked"
    """The calling program asked the session to stop, or is no longer reading the session's events."""
    LIMIT = "limit"
    """The session reached its limit of jobs."""
    IDLE = "idle"
    """The session found no job to claim within its idle time."""
    OTHERS = "others"
    """Other sessions are running the remaining jobs."""
    DEVICE_LOST = "device lost"
    """The session's GPU stopped working."""


@dataclass(frozen=True)
class StopCause:
    """Why a session ends, as a value for programs and in words.

    Attributes:
        signal: the signal's number, if ``kind`` is SIGNAL.
    """

    kind: StopKind
    reason: str
    signal: int | None = None

    @classmethod
    def by_signal(cls, number: int) -> StopCause:
        return cls(StopKind.SIGNAL, signal.Signals(number).name, number)

    @classmethod
    def by_lost_device(cls, why: str) -> StopCause:
        return cls(StopKind.DEVICE_LOST, f"the GPU stopped working ({why})")


TIME_IS_UP = StopCause(StopKind.TIME, "the session's time is up")


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    session: str
    ending: Ending
    cause: StopCause
    jobs_done: int

    @property
    def reason(self) -> str:
        return self.cause.reason
