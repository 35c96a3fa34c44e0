"""Render the latest errors for `mbqueue status`, with advice."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.text import Text

from mbqueue.clock import format_duration
from mbqueue.errors import next_step

#: Matches the class of mbqueue's own errors at the start of a traceback's last line. mbqueue's error messages are clear
#: without the class name.
_OWN_CLASS = re.compile(r"^mbqueue\.errors\.\w+: ")
_MODULE = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_]\w*(?::|$))")
_INDENT = "    "


def last_errors(
    errors: Sequence[Mapping[str, Any]], now: float, width: int, plain: bool, *, at_most: int, lines: int | None
) -> Iterable[Text]:
    """Render up to ``at_most`` errors, on up to ``lines`` lines each. The same error in several folds counts once.

    Without ``lines``, each error is shown in full. An error that does not fit ends with the command that shows it,
    or without the command if there is only one line and the command is long.
    """
    if not errors:
        return
    yield Text("")
    yield Text("Last errors", "bold red")
    alike = _alike(errors, now)
    for group in alike[:at_most]:
        dots, in_full = "..." if plain else "…", f"(in full: mbqueue status {group[0]['experiment']})"
        fits = len(f" {dots} {in_full}") <= width // 2  # leave half of the line for the error
        wrapped = partial(
            textwrap.wrap,
            f"{_where(group)}: {_said(group[0])}",
            width,
            initial_indent="  ",
            subsequent_indent=_INDENT,
            placeholder=f" {dots} {in_full}" if fits else f" {dots}",
            break_on_hyphens=False,
        )
        is_cut = lines is not None and len(wrapped()) > lines
        yield from map(Text, wrapped(max_lines=lines))
        if is_cut and not fits and lines != 1:
            yield Text(f"{_INDENT}{in_full}")
        yield Text(f"{_INDENT}{_what_next(group, now)}", "dim")
    if len(alike) > at_most:
        yield Text(f"  and {len(alike) - at_most} more; list them with: mbqueue events", "dim")


def job_label(job: Mapping[str, Any]) -> str:
    """Describe a job, for example as ``full_finetune fold 2 epoch 7``."""
    return _where([job])


def _alike(errors: Sequence[Mapping[str, Any]], now: float) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for error in errors:
        same = ("experiment", "kind", "epoch", "failures", "error")
        groups.setdefault((*(error[key] for key in same), _is_over(error), _rests(error, now)), []).append(error)
    return list(groups.values())


def _where(jobs: Sequence[Mapping[str, Any]]) -> str:
    job, folds = jobs[0], _folds(jobs)
    fold = f" fold{'s' * (len(folds) > 1)} {', '.join(folds)}" if folds else ""
    what = f" epoch {job['epoch']}" if job["epoch"] is not None else f" {job['kind']}"
    return f"{job['experiment']}{fold}{what}"


def _folds(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(fold) for fold in sorted(job["fold"] for job in jobs if job["fold"] is not None)]


def _said(error: Mapping[str, Any]) -> str:
    text = str(error["error"] or "no message")
    return _MODULE.sub("", _OWN_CLASS.sub("", text))


def _what_next(group: Sequence[Mapping[str, Any]], now: float) -> str:
    error, folds = group[0], _folds(group)
    times = "once" if error["failures"] == 1 else f"{error['failures']} times"
    each = " each" if len(folds) > 1 else ""
    if _is_over(error):
        fold = error["fold"] if len(folds) == 1 else None
        return f"failed {times}{each}; {next_step(str(error['error']), error['experiment'], fold)}"
    if _rests(error, now):
        soonest = min(one["retry_at"] for one in group)
        return f"failed {times}{each}; the next attempt is in {format_duration(soonest - now)}"
    return f"failed {times}{each}; being retried"


def _is_over(error: Mapping[str, Any]) -> bool:
    return bool(error["state"] == "failed")


def _rests(error: Mapping[str, Any], now: float) -> bool:
    return bool(error["retry_at"] and error["retry_at"] > now)
