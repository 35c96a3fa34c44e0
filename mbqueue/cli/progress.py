"""What ``mbqueue work`` shows: one moving line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.status import Status

from mbqueue.clock import format_duration, utc_text
from mbqueue.errors import remedy
from mbqueue.queue.jobs import Job
from mbqueue.session.report import Report

#: In a log, a job that goes on says so this often.
LOG_SECONDS = 15.0


class TerminalReport(Report):
    """Shows a session on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._moving = Status("", console=self._console) if self._console.is_terminal else None
        self._end: float | None = None
        self._last_log = 0.0
        self._is_waiting = False

    def __enter__(self) -> TerminalReport:
        if self._moving:
            self._moving.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._moving:
            self._moving.stop()

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
        if self._moving:
            self._moving.update(text)
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
        self._line(f"{job.label}: FAILED, {again}\n  {type(error).__name__}: {error}{what_to_do}", style="bold red")

    def waiting(self, why: str) -> None:
        if self._moving:
            self._moving.update(f"waiting: {why}")
        elif time.monotonic() - self._last_log >= LOG_SECONDS or not self._is_waiting:
            self._last_log = time.monotonic()
            self._line(f"waiting: {why}")
        self._is_waiting = True

    def note(self, text: str) -> None:
        self._line(f"note: {text}", style="yellow")

    def _line(self, text: str, *, style: str | None = None) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')}  {text}", style=style, markup=False, highlight=False)
        sys.stderr.flush()
