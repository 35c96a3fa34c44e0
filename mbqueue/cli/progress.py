"""What ``mbqueue work`` shows: a moving line for each session on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from mbqueue.clock import format_duration, utc_text
from mbqueue.errors import remedy
from mbqueue.queue.jobs import Job
from mbqueue.session.messages import ToldError
from mbqueue.session.report import Report

#: In a log, a job that goes on says so this often.
LOG_SECONDS = 15.0


class Screen:
    """Standard error, shared by the reports of all sessions; use it as a context."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._rows: dict[str, Spinner] = {}
        # Redrawn by a thread of its own, so that it moves while nothing is told.
        self._live = Live(get_renderable=self._draw, console=self._console, transient=True, refresh_per_second=8)
        self.is_moving = self._console.is_terminal

    def __enter__(self) -> Self:
        if self.is_moving:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.is_moving:
            self._live.stop()

    def line(self, label: str, text: str, *, style: str | None = None) -> None:
        """A line that stays."""
        prefix = f"[{label}] " if label else ""
        now = time.strftime("%H:%M:%S")
        self._console.print(f"{now}  {prefix}{text}", style=style, markup=False, highlight=False)
        sys.stderr.flush()

    def move(self, label: str, text: str) -> None:
        """What the session of this label does now, in place of what it did before."""
        row = Text(f"{label}  {text}" if label else text, no_wrap=True, overflow="ellipsis")
        if label in self._rows:
            self._rows[label].update(text=row)
        else:
            self._rows = {**self._rows, label: Spinner("dots", row)}

    def _draw(self) -> Group:
        return Group(*self._rows.values())


class TerminalReport(Report):
    """Shows a session.

    Args:
        label: told before each line, where several sessions share a screen.
    """

    def __init__(self, screen: Screen, label: str = "") -> None:
        self._screen = screen
        self._label = label
        self._end: float | None = None
        self._last_log = 0.0
        self._is_waiting = False

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        length = "no deadline" if seconds is None else f"{format_duration(seconds)} to the deadline"
        self._line(f"session {session} on {device}, {length}")

    def job_started(self, job: Job) -> None:
        self._last_log, self._is_waiting = time.monotonic(), False
        if job.progress:
            done = ", ".join(f"{key} {value}" for key, value in job.progress.items())
            self._line(f"{job.label}: carrying on ({done})")
        else:
            self._line(f"{job.label}: started")

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        figures = "".join(f", {key.replace('_', ' ')} {value:.4g}" for key, value in facts.items())
        deadline = "" if self._end is None else f", {format_duration(self._end - time.monotonic())} to the deadline"
        text = f"{job.label}: {what} {done}/{total}{figures}{deadline}"
        if self._screen.is_moving:
            self._screen.move(self._label, text)
        elif time.monotonic() - self._last_log >= LOG_SECONDS:
            self._last_log = time.monotonic()
            self._line(text)

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        best = ", best so far" if is_best else ""
        self._line(
            f"{job.label}: train MAE {row['train_mae']:.4f}, validation MAE {row['val_mae']:.4f} eV/atom{best}; "
            f"{format_duration(row['seconds'])}, {row['structures_per_second']:.1f} structures/s"
        )

    def job_finished(self, job: Job, summary: str) -> None:
        self._line(f"{job.label}: {summary}")

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        again = (
            f"next attempt at {utc_text(retry_at)}" if retry_at else f"after mending it: mbqueue retry {job.experiment}"
        )
        what_to_do = f"\n  {remedy(error)}" if remedy(error) else ""
        kind = "" if isinstance(error, ToldError) else f"{type(error).__name__}: "
        self._line(f"{job.label}: FAILED, {again}\n  {kind}{error}{what_to_do}", style="bold red")

    def waiting(self, why: str) -> None:
        if self._screen.is_moving:
            self._screen.move(self._label, f"waiting: {why}")
        elif time.monotonic() - self._last_log >= LOG_SECONDS or not self._is_waiting:
            self._last_log = time.monotonic()
            self._line(f"waiting: {why}")
        self._is_waiting = True

    def note(self, text: str) -> None:
        self._line(f"note: {text}", style="yellow")

    def _line(self, text: str, *, style: str | None = None) -> None:
        self._screen.line(self._label, text, style=style)
