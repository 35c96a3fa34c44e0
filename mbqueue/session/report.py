"""The events that a session reports. The command line shows them; tests collect them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mbqueue.queue.jobs import Job
from mbqueue.session.outcome import SessionOutcome


class Report:
    """Called by the worker, from its main thread unless said otherwise; must return quickly.

    Every method does nothing by itself, so a listener that derives from this class says only what it cares for.
    """

    def starting(self, what: str) -> None:
        """What is being done before the session can begin; told within a moment of its start."""

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        """The session begins; ``seconds`` is its length, None for no deadline."""

    def job_started(self, job: Job) -> None:
        """A job was claimed."""

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        """Part of a job is done: ``what`` is being worked on, with figures such as loss and structures_per_second."""

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        """An epoch was committed; ``row`` is its row of the history."""

    def job_finished(self, job: Job, summary: str) -> None:
        """A job was committed, in words."""

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        """An attempt ended with an error; it is tried again at ``retry_at``, or never when that is None."""

    def waiting(self, why: str) -> None:
        """There is nothing to claim just now."""

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        """The session is over, by itself or by an error. Not told when its process is killed."""

    def note(self, text: str) -> None:
        """Something that a person should know. May come from another thread."""


class Relay(Report):
    """Passes all events on to several listeners, in order. A listener that can no longer write (full disk, lost reader)
    is dropped, and the others are told. A failing report never stops the work.
    """

    def __init__(self, *listeners: Report) -> None:
        self._listeners = listeners

    def starting(self, what: str) -> None:
        self._tell(lambda one: one.starting(what))

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        self._tell(lambda one: one.session_started(session, device, seconds))

    def job_started(self, job: Job) -> None:
        self._tell(lambda one: one.job_started(job))

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        self._tell(lambda one: one.advanced(job, what, done, total, facts))

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        self._tell(lambda one: one.epoch_finished(job, row, is_best=is_best))

    def job_finished(self, job: Job, summary: str) -> None:
        self._tell(lambda one: one.job_finished(job, summary))

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        self._tell(lambda one: one.job_failed(job, error, retry_at))

    def waiting(self, why: str) -> None:
        self._tell(lambda one: one.waiting(why))

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        self._tell(lambda one: one.session_ended(outcome))

    def note(self, text: str) -> None:
        self._tell(lambda one: one.note(text))

    def _tell(self, event: Callable[[Report], None]) -> None:
        for listener in self._listeners:
            try:
                event(listener)
            except OSError as error:
                self._listeners = tuple(one for one in self._listeners if one is not listener)
                self.note(f"{type(listener).__name__} cannot write any more and is told nothing more: {error}")
