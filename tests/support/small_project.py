"""A small real project, a report that remembers events, and a clock that only tests advance."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbqueue.experiment import Spec, load_spec
from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.jobs import Job
from mbqueue.queue.opening import open_queue
from mbqueue.queue.schema import SCHEMA_VERSION
from mbqueue.session.report import Report


class ManualClock:
    """Wall and monotonic time that only `advance` moves, and `sleep`, which returns at once."""

    def __init__(self) -> None:
        self.wall, self.mono = 1_800_000_000.0, 50.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


@dataclass
class RememberedReport(Report):
    """The events that a session reported, in order."""

    lines: list[str] = field(default_factory=list)
    on_advanced: Any = None

    def session_started(self, session: str, device: str, seconds: float | None) -> None:
        self.lines.append(f"session on {device}")

    def job_started(self, job: Job) -> None:
        self.lines.append(f"{job.label}: started")

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        if self.on_advanced:
            self.on_advanced(job, what, done, total)

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:
        self.lines.append(f"{job.label}: epoch {row['epoch']} finished")

    def job_finished(self, job: Job, summary: str) -> None:
        self.lines.append(f"{job.label}: {summary}")

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        self.lines.append(f"{job.label}: failed: {error}")

    def waiting(self, why: str) -> None:
        self.lines.append(f"waiting: {why}")

    def note(self, text: str) -> None:
        self.lines.append(f"note: {text}")


#: Settings that make a full finetune of the real model take only seconds.
SMALL = {
    "data.dataset": "sample",
    "data.limit": 40,
    "train.epochs": 2,
    "train.batch_size": 8,
    "folds": [0],
}


def small_spec(project: ProjectFolder, experiment: str = "full_finetune", **overrides: Any) -> Spec:
    """`SMALL` with dotted overrides written with double underscores (train__lr=1e-3)."""
    laid_over = {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}}
    if experiment == "pretrained_infer":
        laid_over.pop("train.epochs")
    return load_spec(project.experiment_file(experiment), overrides=laid_over)


def enqueue(project: ProjectFolder, spec: Spec) -> Path:
    """Enqueue a spec in the project; return its results folder."""
    with open_queue(project) as queue:
        outcome = queue.enqueue(spec, results_dir=project.results_folder("2026-01-01", spec.folder_name), now=0.0)
    return project.root / outcome.experiment.results_dir


def make_project(root: Path, *, checkpoint_minutes: float = 1e-6, lease_seconds: float = 60.0) -> ProjectFolder:
    """Create a project whose sessions by default commit after every step."""
    init_project(root)
    (root / "mbqueue.toml").write_text(f"checkpoint_minutes = {checkpoint_minutes}\nlease_seconds = {lease_seconds}\n")
    return init_project(root)[0]


def make_split_project(base: Path) -> ProjectFolder:
    """Create a split project in ``base/mount``, with its live folder in ``base/live``."""
    project = ProjectFolder(make_project(base / "mount").root, live=base / "live")
    project.live_dir.mkdir()
    return project


def make_newer(queue_db: Path) -> None:
    """Make a queue look as if a newer mbqueue had written it."""
    with closing(sqlite3.connect(queue_db)) as connection, connection:
        connection.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) "
            "VALUES ('mbqueue.queue', 'of the next', '')"
        )
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
