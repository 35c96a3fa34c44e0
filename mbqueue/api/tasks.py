"""The matbench tasks that experiments can use."""

from __future__ import annotations

from dataclasses import dataclass

from mbqueue.data.datasets import is_at_hand
from mbqueue.results.leaderboard import Published, leaderboard
from mbqueue.results.scores import leaderboard_measure
from mbqueue.task import TASKS, Task


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A row in the table that `mbqueue tasks` prints.

    Attributes:
        measure: the name of the leaderboard's score.
        best: the best published score; None if unknown.
        is_here: whether the task's file is on this machine.
    """

    task: Task
    measure: str
    best: Published | None
    is_here: bool


def list_tasks() -> list[TaskEntry]:
    """List all tasks, largest dataset first."""
    return [
        TaskEntry(
            task=task,
            measure=leaderboard_measure(task.target).label,
            best=next(iter(leaderboard(task.dataset)), None),
            is_here=is_at_hand(task.dataset),
        )
        for task in TASKS.values()
    ]
