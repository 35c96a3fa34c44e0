"""Add notes to the queue's events. A note is an event that does not change a job's state."""

from __future__ import annotations

from mbqueue.queue.database import Statements

_NOTE = "INSERT INTO events (at, by, why, experiment_id, job_id) VALUES (:now, :by, :why, :experiment_id, :job_id)"


def note(
    db: Statements, why: str, *, by: str, now: float, experiment_id: int | None = None, job_id: int | None = None
) -> None:
    db.execute(_NOTE, {"why": why, "by": by, "now": now, "experiment_id": experiment_id, "job_id": job_id})
