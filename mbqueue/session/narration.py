"""Print a session's events as text, for terminals and logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from mbqueue.clock import format_duration, utc_text
from mbqueue.errors import next_step, remedy
from mbqueue.queue.jobs import Job
from mbqueue.session.messages import ToldError
from mbqueue.session.report import Report

#: Seconds between reports of a running job in a log.
LOG_SECONDS = 15.0

Style = str | None


class Narration(Report):
    """Prints the events of a session, one line each.

    Args:
        say: receives a permanent line and its style.
        show: receives the current progress, which replaces the previous progress on the screen. Without ``show``, a
            line of progress is printed every `LOG_SECONDS`.
    """

    def __init__(self, say: Callable[[str, Style], None], *, show: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._show = show
        self._end: float | None = None
        self._last_said = 0.0
        self._last_what = ""
        self._is_waiting = False

    def starting(self, what: str) -> None:
        self._go_on(f"starting: {what}", at_once=True)

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        length = "no deadline" if seconds is None else f"{format_duration(seconds)} to the deadline"
        self._say(f"session {session} on {device}, {length}", None)

    def job_started(self, job: Job) -> None:
        self._last_said, self._is_waiting = time.monotonic(), False
        if job.progress:
            done, total = job.progress.get("done", 0), job.progress.get("total", 0)
            what = job.progress.get("what", "part")
            self._say(
                f"{job.label}: resuming from the last save; an earlier session reached {what} {done} of {total}", None
            )
        else:
            self._say(f"{job.label}: started", None)

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        pace = facts.get("per second")
        left = f", {format_duration((total - done) / pace)} left" if pace and done < total else ""
        rate = f", {_counted(pace)}/s" if pace and left and what != "reading" else ""
        figures = ", ".join(
            f"{key.replace('_', ' ')} {value:.4g}" for key, value in facts.items() if key != "per second"
        )
        deadline = "" if self._end is None else f", {format_duration(self._end - time.monotonic())} to the deadline"
        is_new, self._last_what = what != self._last_what, what
        self._go_on(
            f"{job.label}: {what} {amount_of(what, done, total)}{rate}{left}{deadline}", figures, at_once=is_new
        )

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        best = ", best so far" if is_best else ""
        self._say(
            f"{job.label}: train MAE {row['train_mae']:.4f}, validation MAE {row['val_mae']:.4f}{best}; "
            f"{format_duration(row['seconds'])}, {row['structures_per_second']:.1f} structures/s",
            None,
        )

    def job_finished(self, job: Job, summary: str) -> None:
        self._say(f"{job.label}: {summary}", None)

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        again = f"next attempt at {utc_text(retry_at)}" if retry_at else next_step(str(error), job.experiment)
        what_to_do = f"\n  {remedy(error)}" if remedy(error) else ""
        kind = "" if isinstance(error, ToldError) else f"{type(error).__name__}: "
        self._say(f"{job.label}: FAILED, {again}\n  {kind}{error}{what_to_do}", "bold red")

    def waiting(self, why: str) -> None:
        self._go_on(f"waiting: {why}", at_once=not self._is_waiting)
        self._is_waiting = True

    def note(self, text: str) -> None:
        self._say(f"note: {text}", "yellow")

    def _go_on(self, text: str, figures: str = "", *, at_once: bool = False) -> None:
        if self._show is not None:
            self._show(f"{text}\n  {figures}" if figures else text)  # two lines, to fit into 80 columns
        elif at_once or time.monotonic() - self._last_said >= LOG_SECONDS:
            self._last_said = time.monotonic()
            self._say(f"{text}, {figures}" if figures else text, None)


def amount_of(what: str, done: int, total: int) -> str:
    """Format the progress of one phase of a job; reading, measured in bytes, is shown as a percentage."""
    return f"{done / total:.0%}" if what == "reading" and total > 0 else f"{done}/{total}"


def _counted(rate: float) -> str:
    return f"{rate / 1e6:.3g} M" if rate >= 1e6 else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
