"""Render the output of `mbqueue status` from the queue's overview (see mbqueue.queue.overview).

This module avoids heavy imports, so that the command starts fast. The view fits into 80 columns, and uses more in a
wider terminal. The view uses ASCII if the output cannot show block characters. The view contains no control characters,
so you can pipe it to other programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from mbqueue.clock import format_duration, format_hours
from mbqueue.dashboard.experiments import STYLES, by_interest, cut, experiment, left_out, one_line
from mbqueue.dashboard.failures import job_label, last_errors
from mbqueue.dashboard.searches import search_lines, trial_table
from mbqueue.errors import counted, next_step
from mbqueue.queue.obstacles import obstacles, paused_jobs

#: The order in which the view lists job counts by state. Unfinished jobs come first.
_STATES = ("leased", "ready", "waiting", "failed", "cancelled", "skipped", "committed")
#: The maximum number of experiments to show with their folds. Active experiments, and experiments that need attention,
#: come first.
_EXPERIMENTS_SHOWN = 20


Height = Callable[[Iterable[RenderableType]], int]


class _Limits(NamedTuple):
    sessions: int
    errors: int
    error_lines: int | None


#: Limits for `mbqueue status NAME`, which shows every error in full.
_IN_FULL = _Limits(1000, 1000, None)
#: Limits that are tried in this order until the view fits the console's height.
_LIMITS = (_Limits(1000, 5, 6), _Limits(8, 3, 2), _Limits(3, 2, 2), _Limits(1, 1, 1))


def gpu_seconds(experiment: Mapping[str, Any]) -> tuple[float, float | None]:
    """Compute the device time that an experiment has used, and estimate how much it still needs.

    The estimate for preparing the data uses the current rate. The estimates for epochs and predictions use the mean
    time of finished epochs and predictions.

    Returns:
        the seconds used; the seconds left, or None if some of the remaining work has no estimate.
    """
    folds = experiment["folds"]
    used = float(experiment["seconds"])
    left = 0.0
    if experiment["prepare"] in ("failed", "cancelled"):
        return used, left
    if experiment["prepare"] != "committed":
        preparing = (experiment.get("preparing") or {}).get("seconds_left")
        if preparing is None and experiment.get("preparing"):
            return used, None
        left += preparing or 0.0
    going_on = [fold for fold in folds if fold["state"] not in ("done", "failed", "cancelled")]
    epochs = sum(fold["epochs_total"] - fold["epochs_done"] - fold["epochs_skipped"] for fold in going_on)
    if epochs:
        done = sum(fold["epochs_done"] for fold in folds)
        if not done:
            return used, None
        left += sum(fold.get("epoch_seconds", fold["seconds"]) for fold in folds) / done * epochs
    predicted = [
        fold["seconds"] - fold.get("epoch_seconds", fold["seconds"]) for fold in folds if fold["state"] == "done"
    ]
    if predicted:
        left += sum(predicted) / len(predicted) * len(going_on)
    elif going_on and not left and not any(fold["epochs_total"] for fold in folds):
        return used, None  # only predictions are left, and none has finished yet
    return used, left


class TimeLeft(NamedTuple):
    """Device time of several experiments, in seconds.

    Attributes:
        used: total working time so far, including unfinished jobs.
        left: estimated time left, summed over all experiments and searches that have an estimate.
        unknown_experiments: how many experiments have no estimate of the time left, excluding trials of searches.
        unknown_searches: how many searches have no estimate of the time left.
        sessions: ``left`` divided by the usual length of a session, rounded up.
        has_failed: whether there are failed jobs, whose time is not part of ``left``.
    """

    used: float
    left: float
    unknown_experiments: int
    unknown_searches: int
    sessions: int
    has_failed: bool


def time_left(
    experiments: Sequence[Mapping[str, Any]], session_seconds: float, *, searches: Iterable[Mapping[str, Any]] = ()
) -> TimeLeft:
    """Add up the time that experiments have used and still need, including trials that searches have not begun."""
    searched = {search["name"]: (float(search["seconds"]), search["seconds_left"]) for search in searches}
    alone = [entry for entry in experiments if (entry.get("trial") or {}).get("search") not in searched]
    experiments_left, searches_left = [gpu_seconds(entry) for entry in alone], list(searched.values())
    used_left = experiments_left + searches_left
    known = [left for _, left in used_left if left is not None]
    return TimeLeft(
        used=sum(used for used, _ in used_left),
        left=sum(known),
        unknown_experiments=sum(left is None for _, left in experiments_left),
        unknown_searches=sum(left is None for _, left in searches_left),
        sessions=math.ceil(sum(known) / session_seconds),
        has_failed=any(entry["jobs"].get("failed") for entry in experiments),
    )


def time_text(
    experiments: Sequence[Mapping[str, Any]], session_seconds: float, *, searches: Iterable[Mapping[str, Any]] = ()
) -> str:
    """Describe the time that experiments have used and still need, for example ``2.0 h used, about 4.0 h left``."""
    outlook = time_left(experiments, session_seconds, searches=searches)
    used, left = f"{format_hours(outlook.used)} used", outlook.left
    unknown = [
        (outlook.unknown_experiments, "experiment", "experiments"),
        (outlook.unknown_searches, "search", "searches"),
    ]
    n_unknown = sum(count for count, *_ in unknown)
    if not left:
        if n_unknown:
            return f"{used}; the time left is estimated after the first epoch or fold"
        if outlook.used or outlook.has_failed:
            return f"{used}, no training left{' except failed jobs' if outlook.has_failed else ''}"
        return used
    besides = " (excluding failed jobs)" if outlook.has_failed else ""
    sessions = counted(outlook.sessions, "session")
    text = f"{used}, about {format_hours(left)} left{besides}: {sessions} of {format_duration(session_seconds)}"
    if n_unknown:
        those = " and ".join(counted(count, *noun) for count, *noun in unknown if count)
        text += f"; {those} {'has' if n_unknown == 1 else 'have'} no estimate yet"
    return text


def no_session(overview: Mapping[str, Any]) -> str:
    """Say that no session is running, and what to do about it.

    Args:
        overview: the overview of the whole queue, since a new session would also run jobs of other experiments.
    """
    jobs = overview["jobs"]
    n_free = jobs.get("ready", 0) + jobs.get("leased", 0) - sum(paused_jobs(overview).values())
    can_begin = any(search["state"] == "waiting" for search in overview.get("searches", ()))  # a search's next trial
    if not any(jobs.values()) or n_free or can_begin:
        return "No session is running. Start one with: mbqueue work"
    why = obstacles(overview)
    if not why:
        # A search that was paused between two trials has no job, but trials left.
        searches = [one["name"] for one in overview.get("searches", ()) if one["state"] == "paused"]
        if searches:
            return (
                "No session is running, and only paused searches have trials left.\n"
                f"To continue a search: mbqueue resume {searches[0] if len(searches) == 1 else 'SEARCH'}"
            )
        return "No session is running, and no job is left to run."
    steps = _ways_out(overview)
    return "\n".join([f"No session is running, and no job can run: {', and '.join(why)}.", *steps])


def _ways_out(overview: Mapping[str, Any]) -> Iterable[str]:
    """What the user can do about failed, paused and cancelled jobs, if no job can run."""
    experiments = overview["experiments"]
    failed = [entry["name"] for entry in experiments if entry["jobs"].get("failed")]
    if failed:
        # The overview contains only the newest errors, so an experiment with failed jobs may have none here.
        errors: dict[str, set[str]] = {name: set() for name in failed}
        for error in overview["errors"]:
            if error["state"] == "failed" and error["experiment"] in errors:
                errors[error["experiment"]].add(str(error["error"]))
        steps = {next_step(text, name) for name in failed for text in errors[name] or {""}}
        step = steps.pop() if len(steps) == 1 else next_step("", _only(failed))
        yield f"{step[0].upper()}{step[1:]}"
    paused = paused_jobs(overview)
    if paused:
        # `resume` also takes the name of a search, whose trials are usually paused together.
        names = {
            (entry.get("trial") or {}).get("search", entry["name"]) for entry in experiments if entry["name"] in paused
        }
        yield f"To continue paused jobs: mbqueue resume {_only(names)}"
    if not failed and not paused:
        cancelled = [entry["name"] for entry in experiments if entry["jobs"].get("cancelled")]
        yield f"To run cancelled jobs again: mbqueue retry {_only(cancelled)}"


def _only(names: Iterable[str]) -> str:
    """Return the only name, or a placeholder for one of several names."""
    found = list(names)
    return found[0] if len(found) == 1 else "EXPERIMENT"


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """The output of `mbqueue status`, which rich can print.

    Attributes:
        overview: the queue's overview (see mbqueue.queue.overview for its format).
        whole: the overview of the whole queue; None if ``overview`` covers all experiments.
        session_seconds: usual length of a session, to estimate how many sessions are left.
        fits_height: limit the view to the console's height. Shorten experiments to one line each, beginning with done
            and cancelled experiments. If the view is still too long, leave out some sessions and errors.
        opened: show all trials of searches.
        errors_in_full: show every error in full, unless the view must fit the console's height.
    """

    overview: Mapping[str, Any]
    session_seconds: float
    whole: Mapping[str, Any] | None = None
    fits_height: bool = False
    opened: bool = False
    errors_in_full: bool = False

    @property
    def _shown(self) -> list[Mapping[str, Any]]:
        return [entry for entry in self.overview["experiments"] if not entry.get("trial")]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        if not self.fits_height:
            limits = _IN_FULL if self.errors_in_full else _LIMITS[0]
            all_of_it = self._experiments(_EXPERIMENTS_SHOWN, _EXPERIMENTS_SHOWN, width, plain)
            yield Group(*all_of_it, *self._rest(limits, width, plain))
            return

        def height(parts: Iterable[RenderableType]) -> int:
            return sum(len(console.render_lines(part, options, pad=False)) for part in parts)

        # Leave one line free for the cursor, which would otherwise make a full screen scroll.
        room = console.height - 1
        for limits in _LIMITS:
            rest = list(self._rest(limits, width, plain))
            above = self._shortened(room - height(rest), height, width, plain)
            if height([*above, *rest]) <= room:
                break
        yield Group(*above, *rest)

    def _shortened(self, room: int, height: Height, width: int, plain: bool) -> list[RenderableType]:
        """Fit the experiments into ``room`` lines if possible, and shorten as few of them as possible to one line."""
        shown = self._shown
        n_drawn = len(shown) if len(shown) <= room else max(1, room - 2)
        n_whole = min(n_drawn, _EXPERIMENTS_SHOWN)
        first = by_interest(shown)[:n_whole]
        tables = [height(experiment(shown[position], width, plain)) + 1 for position in first]
        # Besides the tables, the view has one line per shortened experiment, one line about the experiments that are
        # left out, and a blank line.
        others = (n_drawn < len(shown)) + 1
        while n_whole and n_drawn - n_whole + others * (n_whole < len(shown)) + sum(tables[:n_whole]) > room:
            n_whole -= 1
        return self._experiments(n_whole, n_drawn, width, plain)

    def _experiments(self, n_whole: int, n_drawn: int, width: int, plain: bool) -> list[RenderableType]:
        """Render the ``n_drawn`` most relevant experiments in the queue's order; show folds for ``n_whole`` of them."""
        shown = self._shown
        if not shown:
            if self.overview["experiments"]:
                return []
            return [Text("Nothing is enqueued. To enqueue jobs/NAME.toml, run: mbqueue enqueue NAME"), Text("")]
        positions = by_interest(shown)
        whole, drawn = set(positions[:n_whole]), sorted(positions[:n_drawn])
        parts: list[RenderableType] = []
        for position in drawn:
            if position in whole:
                parts += [*experiment(shown[position], width, plain), Text("")]
            else:
                parts.append(one_line(shown[position], width, plain))
        if len(drawn) < len(shown):
            parts.append(left_out(shown, [shown[position] for position in drawn]))
        if len(drawn) < len(shown) or drawn[-1] not in whole:
            parts.append(Text(""))
        return parts

    def _rest(self, limits: _Limits, width: int, plain: bool) -> Iterable[RenderableType]:
        now = self.overview["now"]
        for search in self.overview.get("searches", ()):
            yield from search_lines(search, width, plain, opened=self.opened)
            if self.opened:
                yield trial_table([entry for entry in self.overview["experiments"] if entry["trial"]])
            yield Text("")
        yield from _sessions(self.overview, self.whole or self.overview, now, width, plain, at_most=limits.sessions)
        yield Text("")
        yield from _totals(self.overview, self.session_seconds)
        yield from _publishing(self.overview.get("publishing"), now)
        yield from last_errors(
            self.overview["errors"], now, width, plain, at_most=limits.errors, lines=limits.error_lines
        )


def _publishing(publishing: Mapping[str, Any] | None, now: float) -> Iterable[RenderableType]:
    """Show how much of a project on a drive is published, and how much would be lost if this machine died now."""
    if publishing is None:
        return
    yield Text("")
    at_risk = sum(fold["seconds_at_risk"] for fold in publishing["folds"])
    if publishing["state"] == "degraded":
        since = format_duration(now - publishing["since"])
        yield Text(f"DEGRADED for {since}: {publishing['why']}", "bold red")
    if at_risk or (publishing["folds"] and publishing["state"] != "published"):
        yield Text(
            f"not published yet: {format_duration(at_risk)} of training, which you lose if this machine dies now",
            "yellow",
        )
    else:
        yield Text(f"all committed work is published to {publishing['mount']}", "dim")
    for other in publishing["others"]:
        folds = ", ".join(f"{experiment} fold {fold}" for experiment, fold in other["folds"]) or "no fold yet"
        yield Text(f"another session on this drive: {other['session']} on {other['host']}: {folds}", "cyan")
    if publishing["aside"]:
        yield Text(
            f"{counted(len(publishing['aside']), 'published commit')} kept but not used: two sessions trained the same "
            "fold",
            "yellow",
        )
    if publishing["damaged"]:
        yield Text(f"{counted(len(publishing['damaged']), 'damaged or incomplete file')} on the drive", "yellow")


def _sessions(
    overview: Mapping[str, Any], whole: Mapping[str, Any], now: float, width: int, plain: bool, *, at_most: int
) -> Iterable[RenderableType]:
    sessions = overview["sessions"]
    if not sessions:
        yield Text(no_session(whole))
        return
    yield Text("Sessions", "bold")
    for session in sessions[:at_most]:
        rate, deadline = session["structures_per_second"], session["deadline_at"]
        has_died, is_live = session["state"] == "died", session["state"] == "live"
        heard = f"heard {format_duration(now - session['heartbeat_at'])} ago"
        who = Text.assemble(
            f"  {session['device']}, ",
            (heard if is_live else f"{session['state']}, {heard}", "" if is_live else "yellow"),
            (f", on {session['host']}, {session['id']}", "dim"),
        )
        yield cut(who, width, plain)
        if has_died:
            yield Text(f"    {_left(session['job'])}", "cyan")
            continue
        what = Text.assemble("    ", (job_label(session["job"]) if session["job"] else "idle", "cyan"))
        what.append(_progress(session["job"]))
        if rate is not None:
            what.append(f", {rate:,.1f} crystals/s")
        if deadline is not None:
            what.append(f", ends in {format_duration(deadline - now)}" if deadline > now else ", past its deadline")
        yield what
    if len(sessions) > at_most:
        yield Text(f"  and {len(sessions) - at_most} more", "dim")
    if all(session["state"] == "died" for session in sessions):
        yield Text(no_session(whole))


def _left(job: Mapping[str, Any] | None) -> str:
    if job is None:
        return "had no job"
    at = _progress(job)
    return f"died in {job_label(job)}{f' at{at}' if at else ''}; the next session continues it"


def _progress(job: Mapping[str, Any] | None) -> str:
    """Format a job's progress, for example `` 49 %``; empty if unknown."""
    progress = job and job["progress"]
    if not progress or not progress.get("total"):
        return ""
    return f" {math.floor(100 * progress['done'] / progress['total'])} %"


def _totals(overview: Mapping[str, Any], session_seconds: float) -> Iterable[RenderableType]:
    experiments, jobs = overview["experiments"], overview["jobs"]
    counts = Text("jobs: ")
    named = [*_STATES, *sorted(set(jobs) - set(_STATES))]
    told = [(state, jobs[state]) for state in named if jobs.get(state)]
    for number, (state, count) in enumerate(told):
        counts.append(", " if number else "")
        counts.append(f"{count:,} {state}", STYLES.get(state, ""))
    yield counts if told else Text("jobs: none")
    if not experiments:
        return
    yield Text(f"time: {time_text(experiments, session_seconds, searches=overview.get('searches', ()))}")
