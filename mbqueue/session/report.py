"""The events that a session reports."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

from mbqueue.queue.jobs import Job
from mbqueue.session.outcome import SessionOutcome


class Report:
    """Receives the events of a session.

    The worker calls each method from its main thread, unless the method's docstring mentions other threads. Each method
    must return quickly. By default, every method does nothing, so a subclass defines only the methods that it needs.
    """

    def starting(self, what: str) -> None:
        """The session is preparing to start; ``what`` names the current step."""

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        """The session has started; ``seconds`` is its length, or None if it has no deadline."""

    def job_started(self, job: Job) -> None:
        """A job was claimed."""

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        """Part of a job is done; ``what`` names the current work, and ``facts`` contains figures such as the loss."""

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        """An epoch was committed; ``row`` is its row in the history."""

    def job_finished(self, job: Job, summary: str) -> None:
        """A job was committed; ``summary`` describes the result in words."""

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        """An attempt failed; ``retry_at`` is the time of the next attempt, a Unix timestamp, or None."""

    def waiting(self, why: str) -> None:
        """The session cannot claim a job right now; ``why`` is the reason."""

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        """The session has ended, normally or with an error. This method is not called if the process is killed."""

    def note(self, text: str) -> None:
        """A message for the user. Other threads may call this method."""


#: The names of all events.
EVENTS = tuple(name for name in vars(Report) if not name.startswith("_"))


class Relay(Report):
    """Passes all events on to several listeners, in order.

    If a listener can no longer write (full disk, closed pipe), the relay drops it and sends a note to the others. The
    session continues, and the other listeners still get all events.
    """

    def __init__(self, *listeners: Report) -> None:
        self._listeners = listeners

    def _tell(self, event: str, *arguments: Any, **named: Any) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, event)(*arguments, **named)
            except OSError as error:
                self._listeners = tuple(one for one in self._listeners if one is not listener)
                self.note(f"{type(listener).__name__} can no longer write, so it receives no more events: {error}")


for _event in EVENTS:
    setattr(Relay, _event, partialmethod(Relay._tell, _event))
