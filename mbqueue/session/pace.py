"""Estimate from progress reports how fast a job is running."""

from __future__ import annotations

from mbqueue.clock import Clock


class Pace:
    """The mean rate since the first progress report.

    Work done before the first report, possibly in an earlier session, does not affect the rate.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None
        #: Units of work finished per second; None until two reports have arrived.
        self.per_second: float | None = None

    def reached(self, done: int) -> None:
        now = self._clock.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        elif done > self._first[1] and now > self._first[0]:
            self.per_second = (done - self._first[1]) / (now - self._first[0])
