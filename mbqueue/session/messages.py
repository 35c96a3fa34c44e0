"""Send a session's events as lines of JSON to the process that started the session.

Each line is an object with these keys:

    event            other keys
    starting         what
    session_started  session, device, seconds
    job_started      job
    advanced         job, what, done, total, facts (such as the loss)
    epoch_finished   job, row, is_best
    job_finished     job, summary
    job_failed       job, error, retry_at
    waiting          why
    note             text
    session_ended    session, ending, reason, jobs_done, cause {kind, signal}

``kind`` is a `mbqueue.session.outcome.StopKind`. ``signal`` is null unless a signal ended the session. ``job`` has the
fields of `mbqueue.queue.jobs.Job`. Infinity and NaN are written as null.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import orjson

from mbqueue.errors import remedy
from mbqueue.queue.jobs import Job, Kind, State
from mbqueue.session.outcome import Ending, SessionOutcome, StopCause, StopKind
from mbqueue.session.report import EVENTS, Report

#: The shortest time between reports of a job's progress.
ADVANCED_SECONDS = 0.2


class ToldError(Exception):
    """An error that another process reported: the error's type, its text and what to do."""


class JsonLines(Report):
    """Writes each event to ``stream`` as a line; thread-safe.

    Args:
        stream: must be unbuffered, so that no line is lost when the process ends.
        on_gone: called once, when no process is reading the stream any more; later events are dropped.
    """

    def __init__(self, stream: BinaryIO, *, on_gone: Callable[[], None]) -> None:
        self._stream = stream
        self._on_gone = on_gone
        self._is_gone = False
        self._lock = threading.Lock()
        self._last_advanced = 0.0

    def starting(self, what: str) -> None:
        self._tell("starting", what=what)

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        self._tell("session_started", session=session, device=device, seconds=seconds)

    def job_started(self, job: Job) -> None:
        self._last_advanced = 0.0
        self._tell("job_started", job=job)

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        if time.monotonic() - self._last_advanced >= ADVANCED_SECONDS:
            self._last_advanced = time.monotonic()
            self._tell("advanced", job=job, what=what, done=done, total=total, facts=dict(facts))

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        self._tell("epoch_finished", job=job, row=dict(row), is_best=is_best)

    def job_finished(self, job: Job, summary: str) -> None:
        self._tell("job_finished", job=job, summary=summary)

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        what_to_do = f"\n  {remedy(error)}" if remedy(error) else ""
        self._tell("job_failed", job=job, error=f"{type(error).__name__}: {error}{what_to_do}", retry_at=retry_at)

    def waiting(self, why: str) -> None:
        self._tell("waiting", why=why)

    def note(self, text: str) -> None:
        self._tell("note", text=text)

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        """Write the outcome of a session that ended without an error; after an error, write nothing."""
        if isinstance(outcome, Exception):
            return
        self._tell(
            "session_ended",
            session=outcome.session,
            ending=outcome.ending.name,
            reason=outcome.reason,
            jobs_done=outcome.jobs_done,
            cause={"kind": outcome.cause.kind.value, "signal": outcome.cause.signal},
        )

    def _tell(self, event: str, **details: Any) -> None:
        line = orjson.dumps({"event": event, **details}, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        with self._lock:
            if self._is_gone:
                return
            try:
                self._stream.write(line)
            except OSError:
                self._is_gone = True
        if self._is_gone:
            self._on_gone()


def read_message(line: bytes) -> dict[str, Any] | None:
    """Parse a line into a message; return None if the process printed something else."""
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return message if isinstance(message, dict) and message.get("event") in EVENTS else None


def retell(message: Mapping[str, Any], report: Report) -> SessionOutcome | None:
    """Forward a message to ``report``. The last message is not forwarded; return the outcome that it contains."""
    details = {key: value for key, value in message.items() if key != "event"}
    if "job" in details:
        job = details["job"]
        details["job"] = Job(**{**job, "kind": Kind(job["kind"]), "state": State(job["state"])})
    match message["event"]:
        case "session_ended":
            cause = StopCause(StopKind(details["cause"]["kind"]), details["reason"], details["cause"]["signal"])
            return SessionOutcome(
                session=details["session"],
                ending=Ending[details["ending"]],
                cause=cause,
                jobs_done=details["jobs_done"],
            )
        case "advanced":
            details["facts"] = {key: value for key, value in details["facts"].items() if value is not None}
        case "job_failed":
            details["error"] = ToldError(details["error"])
    getattr(report, message["event"])(**details)
    return None
