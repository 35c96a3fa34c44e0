"""Clocks and durations. Functions take a clock as an argument, so that tests can control time without sleeping.

Wall time (``now``) is recorded, and compared between machines. Monotonic time measures durations within a process.
Changes to the system clock do not affect monotonic time.
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
    def now(self) -> float:
        """The current time, as a Unix timestamp in seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary fixed instant; never decreases."""
        ...

    def sleep(self, seconds: float) -> None:
        """Sleep for about ``seconds`` seconds."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def backoff(tries: int, *, first: float, longest: float) -> float:
    """Return the seconds to wait after ``tries`` consecutive failures. The wait starts at ``first``, doubles with each
    further failure, and is at most ``longest``."""
    return min(longest, first * 2.0 ** min(tries - 1, 30))


def parse_duration(text: str) -> float:
    """Convert a duration such as ``1h50m``, ``90m``, ``45s`` or ``2d`` to seconds.

    Raises:
        UsageError: if the text is not a duration, or the duration is zero.
    """
    compact = text.strip().lower().replace(" ", "")
    parts = _PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise UsageError(f"{text!r} is not a duration. Write, for example, 1h50m, 90m, 45s or 2d.")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"The duration {text!r} is zero. Give a longer one, for example 1h50m.")
    return seconds


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, for example ``1h50m``, ``4m05s`` or ``12s``; a negative duration becomes ``0s``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"


def format_hours(seconds: float) -> str:
    """Format a duration in seconds as hours, for example ``1.5 h``; below one hour, as `format_duration` does."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else format_duration(seconds)


def local_day(timestamp: float) -> str:
    """Format the date of a timestamp in this machine's time zone, for example ``2026-11-23``."""
    return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d")


def utc_text(timestamp: float) -> str:
    """Format a timestamp as ISO 8601 in UTC, to the second, for example ``2026-11-23T04:29:00Z``."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
