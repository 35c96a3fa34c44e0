"""What `mbqueue status` shows, from the overview that the queue gives (see mbqueue.queue.overview).

Imports rich only, so that the command answers at once. The view fits 80 columns, grows with the terminal, uses
ASCII where the output cannot show blocks, and carries no control characters of its own, so it reads well in a pipe.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from mbqueue.clock import format_duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-~=+*#"
_BAR = 10
#: The order in which counts of jobs are told: what is open first.
_STATES = ("leased", "ready", "waiting", "failed", "cancelled", "skipped", "committed")
_STYLES = {
    "leased": "cyan",
    "running": "cyan",
    "ready": "blue",
    "committed": "green",
    "done": "green",
    "failed": "bold red",
    "paused": "yellow",
    "cancelled": "dim",
    "waiting": "dim",
}
_NOBODY = "No session is at work. Start one with: mbqueue work"
_ERRORS_SHOWN = 5
#: With more experiments than this, those are drawn on which something happens or should, the newest first among equals.
_EXPERIMENTS_SHOWN = 20
_BY_INTEREST = ("running", "failed", "paused", "ready", "waiting", "cancelled", "done")


def render(
    overview: Mapping[str, Any],
    *,
    now: float,
    session_seconds: float,
    experiment: str | None = None,
    width: int | None = None,
) -> RenderableType:
    """The dashboard.

    Args:
        overview: what the queue's overview returns (its format is documented there).
        now: seconds since the epoch, for ages and times to deadlines.
        session_seconds: usual length of a session, in which the remaining work is also told.
        experiment: show only this one; its sparklines then take the free width.
        width: columns to fill; by default those of the console.
    """
    return _Dashboard(overview, now, session_seconds, experiment, width)


def sparkline(values: Sequence[float], length: int, *, low: float, high: float, ascii_only: bool = False) -> str:
    """``values`` as at most ``length`` blocks on a logarithmic scale from ``low`` to ``high``.

    Longer series are averaged in equal stretches. Values that are not finite or not above 0 show as ``?``.
    """
    levels = _ASCII_LEVELS if ascii_only else _BLOCKS
    if len(values) > length:
        borders = [round(i * len(values) / length) for i in range(length + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(borders)]
    marks = []
    for value in values:
        if not _is_drawable(value):
            marks.append("?")
            continue
        span = math.log(high / low) if high > low > 0 else 0.0
        share = math.log(value / low) / span if span else 0.0
        marks.append(levels[min(len(levels) - 1, max(0, round(share * (len(levels) - 1))))])
    return "".join(marks)


def bar(done: int, total: int, length: int = _BAR, *, ascii_only: bool = False) -> str:
    """A bar of ``length`` signs; it is full only when everything is done, and empty only when nothing is."""
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    if total <= 0:
        return empty * length
    filled = round(length * done / total)
    if done < total:
        filled = min(filled, length - 1)
    if done > 0:
        filled = max(filled, 1)
    return full * filled + empty * (length - filled)


def gpu_seconds(experiment: Mapping[str, Any]) -> tuple[float, float | None]:
    """(seconds used, seconds left) by an experiment.

    Left is the number of open epochs times the mean of the finished ones, so predictions and preparation are not
    in it; None when no epoch is finished yet, 0.0 when none is open.
    """
    folds = experiment["folds"]
    used = float(experiment["seconds"])
    done = sum(fold["epochs_done"] for fold in folds)
    left = sum(
        fold["epochs_total"] - fold["epochs_done"] - fold["epochs_skipped"]
        for fold in folds
        if fold["state"] not in ("done", "cancelled")
    )
    if left == 0:
        return used, 0.0
    return used, sum(fold["seconds"] for fold in folds) / done * left if done else None


class _Dashboard:
    def __init__(
        self,
        overview: Mapping[str, Any],
        now: float,
        session_seconds: float,
        experiment: str | None,
        width: int | None,
    ) -> None:
        self.overview = overview
        self.now = now
        self.session_seconds = session_seconds
        self.experiment = experiment
        self.width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width or options.max_width, options.max_width)
        plain = options.ascii_only
        shown = [e for e in self.overview["experiments"] if self.experiment in (None, e["name"])]
        parts: list[RenderableType] = []
        if not shown:
            parts.append(Text("Nothing is enqueued. Start with: mbqueue enqueue NAME (the files in jobs/)."))
        drawn = _most_interesting(shown)
        for entry in drawn:
            parts += [*_experiment(entry, width, plain), Text("")]
        if len(drawn) < len(shown):
            parts += [_left_out(shown, drawn), Text("")]
        parts += [*_sessions(self.overview["sessions"], self.now, width), Text("")]
        parts += _totals(shown, self.overview["jobs"], self.session_seconds)
        parts += _publishing(self.overview.get("publishing"), self.now)
        parts += _errors(
            [error for error in self.overview["errors"] if self.experiment in (None, error["experiment"])],
            self.now,
            width,
        )
        yield Group(*parts)


def _most_interesting(experiments: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most so many as can be taken in, in the order of the queue."""
    by_interest = sorted(range(len(experiments)), key=lambda i: (_BY_INTEREST.index(experiments[i]["state"]), -i))
    return [experiments[i] for i in sorted(by_interest[:_EXPERIMENTS_SHOWN])]


def _left_out(shown: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]]) -> Text:
    names = {entry["name"] for entry in drawn}
    states = Counter(entry["state"] for entry in shown if entry["name"] not in names)
    counts = ", ".join(f"{states[state]:,} {state}" for state in _BY_INTEREST if states[state])
    return Text(f"and {len(shown) - len(drawn):,} more experiments: {counts}. One of them: mbqueue status NAME", "dim")


def _publishing(publishing: Mapping[str, Any] | None, now: float) -> Iterable[RenderableType]:
    """What of a project on a drive is published, and what would be lost if this machine died now."""
    if publishing is None:
        return
    yield Text("")
    at_risk = sum(fold["seconds_at_risk"] for fold in publishing["folds"])
    if publishing["state"] == "degraded":
        since = format_duration(now - publishing["since"])
        yield Text(f"DEGRADED for {since}: {publishing['why']}", "bold red")
    if at_risk or (publishing["folds"] and publishing["state"] != "published"):
        yield Text(
            f"not published yet: {format_duration(at_risk)} of training, lost if this machine died now", "yellow"
        )
    else:
        yield Text(f"everything committed is published to {publishing['mount']}", "dim")
    for other in publishing["others"]:
        folds = ", ".join(f"{experiment} fold {fold}" for experiment, fold in other["folds"]) or "no fold yet"
        yield Text(f"another session on this drive: {other['session']} on {other['host']}: {folds}", "cyan")
    if publishing["aside"]:
        yield Text(f"{len(publishing['aside'])} published commits are not of an accepted line; they are kept", "yellow")
    if publishing["damaged"]:
        yield Text(f"{len(publishing['damaged'])} files on the drive are damaged or not all there yet", "yellow")


def _experiment(entry: Mapping[str, Any], width: int, plain: bool) -> Iterable[RenderableType]:
    title = Text.assemble((entry["name"], "bold"), "  ", (entry["state"], _STYLES.get(entry["state"], "")))
    if entry["paused"] and entry["state"] != "paused":
        title.append(" (paused)", _STYLES["paused"])
    title.append(f"  {entry['dataset']}", "dim")
    if entry["priority"]:
        title.append(f"  priority {entry['priority']}", "dim")
    title.truncate(width, overflow="ellipsis")
    yield title
    if entry["prepare"] != "committed":
        yield Text(f"  preparing the data comes first: {entry['prepare']}", _STYLES.get(entry["prepare"], ""))
    yield from _folds(entry["folds"], width, plain)
    tested = [fold["test_mae"] for fold in entry["folds"] if fold["test_mae"] is not None]
    if len(tested) > 1:
        mean = sum(tested) / len(tested)
        spread = math.sqrt(sum((value - mean) ** 2 for value in tested) / len(tested))
        sign = "+-" if plain else "±"
        yield Text(f"  test MAE {mean:.4f} {sign} {spread:.4f} eV/atom over {len(tested)} folds", "bold")
    if entry["record"] == "committed":
        yield Text(f"  results: {entry['results_dir']}", "dim")


#: Columns of the table of folds, and whether they are flush right. Written line by line, because rich's own table
#: takes longer for the 500 folds of 100,000 jobs than everything else together.
_COLUMNS = (
    ("fold", False), ("epochs", False), ("", True), ("state", False), ("validation MAE", False), ("best", True),
    ("at", True), ("test MAE", True),
)  # fmt: skip


def _folds(folds: Sequence[Mapping[str, Any]], width: int, plain: bool) -> Iterable[Text]:
    curves = [[math.nan if value is None else value for value in fold["val_mae"]] for fold in folds]
    drawn = [value for curve in curves for value in curve if _is_drawable(value)]
    low, high = (min(drawn), max(drawn)) if drawn else (1.0, 1.0)
    rows = [[(header, "dim") for header, _ in _COLUMNS]]
    for fold, curve in zip(folds, curves, strict=True):
        done, total = fold["epochs_done"], fold["epochs_total"]
        over = done + fold["epochs_skipped"] == total
        rows.append(
            [
                (str(fold["fold"]), ""),
                (bar(done, total, ascii_only=plain), "green" if over else "cyan") if total else ("none", "dim"),
                (f"{done}/{total}" if total else "", ""),
                (_fold_state(fold), _STYLES.get(fold["state"], "")),
                (sparkline(curve, max(14, width - 66), low=low, high=high, ascii_only=plain), "cyan"),
                (_mae(fold["best_val_mae"], plain), ""),
                ("" if fold["best_epoch"] is None else str(fold["best_epoch"]), ""),
                (_mae(fold["test_mae"], plain), "bold"),
            ]
        )
    widths = [max(len(row[column][0]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        line = Text(no_wrap=True, overflow="ellipsis")
        for (content, style), (_, flush_right), columns in zip(row, _COLUMNS, widths, strict=True):
            line.append(content.rjust(columns) if flush_right else content.ljust(columns), style)
            line.append("  ")
        line.rstrip()
        yield line


def _fold_state(fold: Mapping[str, Any]) -> str:
    running = fold["running"]
    if running is None:
        return str(fold["state"])
    return str(running["kind"]) if running["epoch"] is None else f"epoch {running['epoch']}"


def _sessions(sessions: Sequence[Mapping[str, Any]], now: float, width: int) -> Iterable[RenderableType]:
    if not sessions:
        yield Text(_NOBODY)
        return
    yield Text("Sessions", "bold")
    for session in sessions:
        rate, deadline = session["structures_per_second"], session["deadline_at"]
        has_died, is_live = session["state"] == "died", session["state"] == "live"
        heard = f"heard {format_duration(now - session['heartbeat_at'])} ago"
        who = Text.assemble(
            f"  {session['device']}, ",
            (heard if is_live else f"{session['state']}, {heard}", "" if is_live else "yellow"),
            (f", on {session['host']}, {session['id']}", "dim"),
        )
        who.truncate(width, overflow="ellipsis")
        yield who
        if has_died:
            yield Text(f"    {_left(session['job'])}", "cyan")
            continue
        what = Text.assemble("    ", (_job_label(session["job"]) if session["job"] else "idle", "cyan"))
        what.append(_progress(session["job"]))
        if rate is not None:
            what.append(f", {rate:,.1f} crystals/s")
        if deadline is not None:
            what.append(f", ends in {format_duration(deadline - now)}" if deadline > now else ", past its deadline")
        yield what
    if all(session["state"] == "died" for session in sessions):
        yield Text(_NOBODY)


def _left(job: Mapping[str, Any] | None) -> str:
    """What a session that died has left behind."""
    if job is None:
        return "held no job"
    at = _progress(job)
    return f"left {_job_label(job)}{f' at{at}' if at else ''}; the next session takes over"


def _progress(job: Mapping[str, Any] | None) -> str:
    """How far a job is, like `` 49 %``; nothing while it has not told."""
    progress = job and job["progress"]
    if not progress or not progress.get("total"):
        return ""
    return f" {math.floor(100 * progress['done'] / progress['total'])} %"


def _hours(seconds: float) -> str:
    """Hours of a device; of less than one the minutes and seconds."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else format_duration(seconds)


def _totals(
    experiments: Sequence[Mapping[str, Any]], jobs: Mapping[str, int], session_seconds: float
) -> Iterable[RenderableType]:
    counts = Text("jobs: ")
    named = [*_STATES, *sorted(set(jobs) - set(_STATES))]
    told = [(state, jobs[state]) for state in named if jobs.get(state)]
    for number, (state, count) in enumerate(told):
        counts.append(", " if number else "")
        counts.append(f"{count:,} {state}", _STYLES.get(state, ""))
    yield counts if told else Text("jobs: none")
    if not experiments:
        return
    used_left = [gpu_seconds(entry) for entry in experiments]
    used = sum(seconds for seconds, _ in used_left)
    known = [seconds for _, seconds in used_left if seconds is not None]
    unknown = len(used_left) - len(known)
    line = Text(f"time: {_hours(used)} used")
    left = sum(known)
    if left:
        sessions = math.ceil(left / session_seconds)
        plural = "session" if sessions == 1 else "sessions"
        line.append(f", about {_hours(left)} left: {sessions} {plural} of {format_duration(session_seconds)}")
    if unknown:
        more = " more" if left else ""
        line.append(f", time{more} left is known after the first epoch of {unknown} experiment{'s' * (unknown > 1)}")
    elif not left and used:
        line.append(", none left")
    yield line


def _errors(errors: Sequence[Mapping[str, Any]], now: float, width: int) -> Iterable[RenderableType]:
    if not errors:
        return
    yield Text("")
    yield Text("Last errors", "bold red")
    for error in errors[:_ERRORS_SHOWN]:
        text = Text(f"  {_job_label(error)}: {error['error'] or 'no message'}")
        text.truncate(width, overflow="ellipsis")
        yield text
        yield Text(f"    {_what_next(error, now)}", "dim")
    if len(errors) > _ERRORS_SHOWN:
        yield Text(f"  and {len(errors) - _ERRORS_SHOWN} more: mbqueue events", "dim")


def _what_next(error: Mapping[str, Any], now: float) -> str:
    times = "once" if error["failures"] == 1 else f"{error['failures']} times"
    if error["state"] in ("failed", "cancelled"):
        fold = "" if error["fold"] is None else f" --fold {error['fold']}"
        return f"failed {times}; try again with: mbqueue retry {error['experiment']}{fold}"
    if error["retry_at"] and error["retry_at"] > now:
        return f"failed {times}; tried again in {format_duration(error['retry_at'] - now)}"
    return f"failed {times}; tried again"


def _job_label(job: Mapping[str, Any]) -> str:
    """For example ``full_finetune fold 2 epoch 7``."""
    fold = "" if job["fold"] is None else f" fold {job['fold']}"
    what = f" epoch {job['epoch']}" if job["epoch"] is not None else f" {job['kind']}"
    return f"{job['experiment']}{fold}{what}"


def _is_drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _mae(value: float | None, plain: bool) -> str:
    if value is None:
        return "-" if plain else "–"
    return f"{value:.4f}"
