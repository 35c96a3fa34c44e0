"""Perform the actions of the board's buttons, by calling the same methods of `mbqueue.Project` as the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mbqueue.api import Project
from mbqueue.errors import UsageError, counted
from mbqueue.experiment_file import parse_overrides

#: The longest time, in seconds, that the board waits for sessions to stop before it reports how many are still saving.
_STOP_WAIT_SECONDS = 5.0


def act(project: Project, name: str, given: Mapping[str, Any]) -> str:
    """Perform the action of a button, and return a sentence about its outcome.

    Args:
        name: pause, resume, cancel, retry, priority, enqueue or stop.
        given: the values that the page sent. Most actions use `experiment` and `fold` (a number or null). The action
            "priority" also uses `priority`, a number, and "enqueue" uses the fields of its form, as text. The action
            "stop" uses only `session`, the id of a session. Without an id, "stop" ends all sessions on this machine.

    Raises:
        UsageError: if the action is unknown, or a value is missing or has the wrong type.
        MbqueueError: if the action fails in `mbqueue.Project`.
    """
    chosen = _ACTS.get(name)
    if chosen is None:
        raise UsageError(f"There is no action {name!r}. Use one of {', '.join(_ACTS)}.")
    return chosen(project, given)


def _pause(project: Project, given: Mapping[str, Any]) -> str:
    experiment, fold = _which(given)
    return f"Paused {counted(project.pause(experiment, fold=fold), 'job')} of {_label(experiment, fold)}."


def _resume(project: Project, given: Mapping[str, Any]) -> str:
    experiment, fold = _which(given)
    return f"Resumed {counted(project.resume(experiment, fold=fold), 'job')} of {_label(experiment, fold)}."


def _cancel(project: Project, given: Mapping[str, Any]) -> str:
    experiment, fold = _which(given)
    return f"Cancelled {counted(project.cancel(experiment, fold=fold), 'job')} of {_label(experiment, fold)}."


def _retry(project: Project, given: Mapping[str, Any]) -> str:
    experiment, fold = _which(given)
    changed = project.retry(experiment, fold=fold)
    if not changed:
        return "There is no job to retry."
    return f"{counted(changed, 'job')} of {_label(experiment, fold)} will run again."


def _priority(project: Project, given: Mapping[str, Any]) -> str:
    experiment, fold = _which(given)
    priority = _whole(given, "priority")
    project.set_priority(experiment, priority, fold=fold)
    return f"{_label(experiment, fold)} now has priority {priority}."


def _stop(project: Project, given: Mapping[str, Any]) -> str:
    session = _text(given, "session", required=False) or None
    stopped = project.stop(session=session, wait_seconds=_STOP_WAIT_SECONDS)
    if not stopped:
        return (
            "This session is not running on this machine."
            if session
            else "No session of this project is running on this machine."
        )
    ended = sum(one.reason is not None for one in stopped)
    refused = sum(one.is_refused for one in stopped)
    saving = len(stopped) - ended - refused
    parts = [(ended, "ended"), (saving, "still saving"), (refused, "belong to another user")]
    return f"Sessions on this machine: {', '.join(f'{count} {what}' for count, what in parts if count)}."


def _enqueue(project: Project, given: Mapping[str, Any]) -> str:
    experiment = _text(given, "experiment")
    if experiment not in [path.stem for path in project.folder.jobs_dir.glob("*.toml")]:
        raise UsageError(f"There is no experiment {experiment!r} in jobs/.")
    lines = [line.strip() for line in str(given.get("settings") or "").splitlines() if line.strip()]
    outcome = project.enqueue(
        experiment,
        name=_text(given, "name", required=False) or None,
        dataset=_text(given, "dataset", required=False) or None,
        priority=_whole(given, "priority") if given.get("priority") else 0,
        settings=parse_overrides(lines),
    )
    return f"{outcome.experiment.name}: {outcome.outcome}."


_ACTS: dict[str, Callable[[Project, Mapping[str, Any]], str]] = {
    "pause": _pause,
    "resume": _resume,
    "cancel": _cancel,
    "retry": _retry,
    "priority": _priority,
    "enqueue": _enqueue,
    "stop": _stop,
}


def _which(given: Mapping[str, Any]) -> tuple[str, int | None]:
    return _text(given, "experiment"), None if given.get("fold") is None else _whole(given, "fold")


def _text(given: Mapping[str, Any], key: str, *, required: bool = True) -> str:
    value = given.get(key)
    if not isinstance(value, str) or (required and not value.strip()):
        if not required and value is None:
            return ""
        raise UsageError(f"Fill in the field {key}.")
    return value.strip()


def _whole(given: Mapping[str, Any], key: str) -> int:
    try:
        return int(str(given.get(key)))
    except ValueError:
        raise UsageError(f"{key} is {given.get(key)!r}. Enter a whole number.") from None


def _label(experiment: str, fold: int | None) -> str:
    return experiment if fold is None else f"{experiment} fold {fold}"
