"""Lines among the events that are no change of a job's state."""

from __future__ import annotations

from mbqueue.queue.database import Statements

_NOTE = "INSERT INTO events (at, by, why, experiment_id, job_id) VALUES (:now, :by, :why, :experiment_id, :job_id)"


def note(
    db: Statements, why: str, *, by: str, now: float, experiment_id: int | None = None, job_id: int | None = None
) -> None:
    """Add a line; the experiment or the job is what it is about."""
    db.execute(_NOTE, {"why": why, "by": by, "now": now, "experiment_id": experiment_id, "job_id": job_id})
