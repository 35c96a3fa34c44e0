"""Decide when a session stops: at its deadline, after a signal, or on request.

Signal handlers only set a flag. The session reads the flag between two training steps, when its state is consistent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mbqueue.clock import Clock
from mbqueue.session.outcome import StopCause, StopKind

#: Batch systems can send SIGUSR1 or SIGUSR2 before they end a job (`sbatch --signal`).
GRACEFUL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 130


class StopRequest:
    """A thread-safe request to stop one session. Later requests do not replace the first cause.

    The request is a simple flag and not a `threading.Event`, which can deadlock. A signal handler that interrupts the
    thread holding the event's lock would wait for that lock forever.
    """

    #: How often a wait checks for a stop request.
    _NOTICE_SECONDS = 0.1

    def __init__(self) -> None:
        self._cause: StopCause | None = None

    @property
    def cause(self) -> StopCause | None:
        """The cause of the stop; None if no stop is requested."""
        return self._cause

    @property
    def reason(self) -> str | None:
        """The cause of the stop in words; None if no stop is requested."""
        return None if self._cause is None else self._cause.reason

    def __bool__(self) -> bool:
        return self._cause is not None

    def request(self, cause: StopCause | str) -> None:
        """Ask the session to stop before its next step; the cause may be any text."""
        if self._cause is None:
            self._cause = StopCause(StopKind.ASKED, cause) if isinstance(cause, str) else cause

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; return True as soon as a stop is requested, else False."""
        end = time.monotonic() + seconds
        while self._cause is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._NOTICE_SECONDS))
        return self._cause is not None


@contextmanager
def graceful_signals(stop: StopRequest, *, at_once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 into a request to stop while the block runs.

    A second SIGINT calls ``at_once`` and ends the process with code 130. Only the work since the last published
    checkpoint is lost. Outside the main thread, signals cannot be caught, and the block just runs.
    """

    interrupts = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        # Count the SIGINTs: when the first one arrives, the session may already be stopping for another reason.
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            at_once()
            os._exit(INTERRUPTED)
        stop.request(StopCause.by_signal(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in GRACEFUL_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Deadline:
    """The deadline of a session, and whether work can finish before it.

    Times are monotonic seconds, so a change of the wall clock has no effect. The time reserved for saving is the
    longest save so far, plus a margin.

    Args:
        session_seconds: length of the session; None for no deadline.
        end_command_seconds: how long the end command may take. A session reserves at most a fifth of its length for the
            end command, so that a short session still trains.
    """

    #: Time kept free before the deadline, in addition to the time that a save takes.
    MARGIN_SECONDS = 10.0
    #: The assumed duration of a save until the session has measured one.
    FIRST_SAVE_SECONDS = 5.0
    #: The end command may reserve at most this fraction of a session's length.
    END_COMMAND_SHARE = 0.2

    def __init__(self, clock: Clock, session_seconds: float | None, *, end_command_seconds: float = 0.0) -> None:
        self._clock = clock
        self._end: float | None = None
        if session_seconds is not None:
            kept = min(end_command_seconds, self.END_COMMAND_SHARE * session_seconds)
            self._end = clock.monotonic() + session_seconds - kept
        self._margin = min(self.MARGIN_SECONDS, 0.1 * session_seconds) if session_seconds else 0.0
        self._save_seconds = min(self.FIRST_SAVE_SECONDS, 0.1 * session_seconds) if session_seconds else 0.0
        self._publish_seconds = 0.0

    @property
    def at(self) -> float | None:
        """Wall-clock time of the deadline, for display; None if there is no deadline."""
        return None if self._end is None else self._clock.now() + self.remaining()

    def remaining(self) -> float:
        """Seconds until the deadline; infinity if there is no deadline."""
        return float("inf") if self._end is None else self._end - self._clock.monotonic()

    def saw_save(self, seconds: float) -> None:
        self._save_seconds = max(self._save_seconds, seconds)

    def saw_publish(self, seconds: float) -> None:
        """Record that publishing to the mount took ``seconds``.

        If publishing becomes slower, the session reserves the longer time immediately. If publishing becomes faster,
        each call shortens the reserved time by at most a fifth.
        """
        self._publish_seconds = max(seconds, 0.8 * self._publish_seconds)

    def spare(self) -> float:
        """Seconds left for work, after subtracting the time to save and publish; may be negative."""
        return self.remaining() - self._save_seconds - self._publish_seconds - self._margin

    def allows(self, seconds: float) -> bool:
        """Whether work that takes ``seconds`` can be done, saved and published before the deadline."""
        return self.spare() > seconds
