"""Clocks. Callers pass them in, so that tests control time and need not sleep.

Wall time (``now``) is recorded and compared between machines. Monotonic time measures durations within a process, so
setting the system clock does not affect them.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Protocol

from mbqueue.errors import UsageError

_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class Clock(Protocol):
    """The interface of a clock."""

    def now(self) -> float:
        """Seconds since the epoch (UTC)."""
        ...

    def monotonic(self) -> float:
        """Seconds since a fixed instant of this process; never decreases."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait for about ``seconds``, then return."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def backoff(tries: int, *, first: float, longest: float) -> float:
    """Seconds to wait after a number of failures in a row; the wait doubles each time, from ``first`` to
    ``longest``."""
    return min(longest, first * 2.0 ** min(tries - 1, 30))


def parse_duration(text: str) -> float:
    """Seconds in a duration such as ``1h50m``, ``90m``, ``45s`` or ``2d``.

    Raises:
        UsageError: if the text is anything else, including zero.
    """
    compact = text.strip().lower().replace(" ", "")
    parts = _PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise UsageError(f"{text!r} is not a duration. Write it like 1h50m, 90m, 45s or 2d.")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"The duration {text!r} is zero. Give a time above 0, like 1h50m.")
    return seconds


def format_duration(seconds: float) -> str:
    """Format a duration for people: ``1h50m``, ``4m05s``, ``12s``; negative durations count as 0."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"


def utc_text(timestamp: float) -> str:
    """An instant as ISO 8601 in UTC, to the second: ``2026-11-23T04:29:00Z``."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
