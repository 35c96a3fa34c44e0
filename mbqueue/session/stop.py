"""Why and when a session stops: signals, the deadline, a lost lease.

Signal handlers only set a flag, which the loop reads between two training steps, where the state is consistent.
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

#: SIGUSR1 and SIGUSR2 are what batch systems send before they take a machine away (`sbatch --signal`).
GRACEFUL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 130


class StopRequest:
    """A request to stop one session; thread-safe; the first cause is kept.

    This is a flag, not a `threading.Event`: a signal handler may interrupt a thread that is waiting for the event and
    holds its lock, so setting the event would deadlock.
    """

    #: How often a wait checks for a request.
    _NOTICE_SECONDS = 0.1

    def __init__(self) -> None:
        self._cause: StopCause | None = None

    @property
    def cause(self) -> StopCause | None:
        """Why the session should stop, or None as long as it may run."""
        return self._cause

    @property
    def reason(self) -> str | None:
        """The same in words."""
        return None if self._cause is None else self._cause.reason

    def __bool__(self) -> bool:
        return self._cause is not None

    def request(self, cause: StopCause | str) -> None:
        """Request a stop between two steps; the cause may be any text."""
        if self._cause is None:
            self._cause = StopCause(StopKind.ASKED, cause) if isinstance(cause, str) else cause

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; True as soon as a stop is requested."""
        end = time.monotonic() + seconds
        while self._cause is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._NOTICE_SECONDS))
        return self._cause is not None


@contextmanager
def graceful_signals(stop: StopRequest, *, at_once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 into a request to stop while the block runs.

    A second SIGINT calls ``at_once`` and ends the process with code 130: the last published checkpoint is complete at
    every instant, so only the work since then is lost. Outside the main thread signals cannot be caught; then this does
    nothing.
    """

    interrupts = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        # They are counted, since the session may already be stopping for another reason at the first one.
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
    """When a session must end, and what may still begin before that.

    Times are monotonic seconds, so a jump of the wall clock changes nothing. The time to save is the longest save so
    far, plus a margin.

    Args:
        session_seconds: length of the session; None for no deadline.
        end_command_seconds: how long the end command may take. This time is kept free, up to a share of the session, so
            that a short session still does something.
    """

    #: Kept free before the deadline, in addition to the time of a save.
    MARGIN_SECONDS = 10.0
    #: The assumed time of a save before the first one was measured.
    FIRST_SAVE_SECONDS = 5.0
    #: The largest share of a session that is kept for its end command.
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
        """Wall-clock time of the deadline, for display; None without one."""
        return None if self._end is None else self._clock.now() + self.remaining()

    def remaining(self) -> float:
        """Seconds to the deadline; infinite without one."""
        return float("inf") if self._end is None else self._end - self._clock.monotonic()

    def saw_save(self, seconds: float) -> None:
        """Learn from a save that took ``seconds``."""
        self._save_seconds = max(self._save_seconds, seconds)

    def saw_publish(self, seconds: float) -> None:
        """Learn from publishing to the mount, which took ``seconds``; a slow one is forgotten after a while."""
        self._publish_seconds = max(seconds, 0.8 * self._publish_seconds)

    def spare(self) -> float:
        """Seconds left for work, so that a save and publishing still end before the deadline; may be negative."""
        return self.remaining() - self._save_seconds - self._publish_seconds - self._margin

    def allows(self, seconds: float) -> bool:
        """Whether work of ``seconds``, then a save and its publishing, would end before the deadline."""
        return self.spare() > seconds
