"""How a session ended. Without torch, so that whoever started it can read it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """How a session ended."""

    DONE = "nothing is left to do"
    STOPPED = "stopped with work left"
    BLOCKED = "what is left waits for a person: jobs failed, or are paused or cancelled"


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """What a session did.

    Attributes:
        reason: why it ended, in words.
        jobs_done: jobs that it committed.
    """

    session: str
    ending: Ending
    reason: str
    jobs_done: int
