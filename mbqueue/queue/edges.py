"""Which job needs which, and making ready whatever has all it needs."""

from __future__ import annotations

from mbqueue.queue.database import Statements

# prepare → first job of each fold; train n → train n + 1; last train → predict; every predict → record.
# Subqueries, since of joins either database may read a fold's epochs once for each of them. The + in "+later.fold":
# SQLite has no use for an index on an expression when that is compared with a plain column.
_LINKS = (
    """
    INSERT INTO needs (job_id, needed_id)
    SELECT later.id, earlier.id FROM jobs AS later JOIN jobs AS earlier
        ON earlier.experiment_id = later.experiment_id AND earlier.kind = 'prepare'
        AND ifnull(earlier.fold, -1) = -1 AND ifnull(earlier.epoch, -1) = -1
    WHERE later.experiment_id = :experiment_id
      AND ((later.kind = 'train' AND later.epoch = 1) OR (later.kind = 'predict' AND :epochs = 0))
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO needs (job_id, needed_id)
    SELECT later.id, (SELECT id FROM jobs AS earlier
                      WHERE earlier.experiment_id = later.experiment_id AND earlier.kind = 'train'
                        AND ifnull(earlier.fold, -1) = +later.fold AND ifnull(earlier.epoch, -1) = later.epoch - 1)
    FROM jobs AS later WHERE later.experiment_id = :experiment_id AND later.kind = 'train' AND later.epoch > 1
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO needs (job_id, needed_id)
    SELECT later.id, (SELECT id FROM jobs AS earlier
                      WHERE earlier.experiment_id = later.experiment_id AND earlier.kind = 'train'
                        AND ifnull(earlier.fold, -1) = +later.fold AND ifnull(earlier.epoch, -1) = :epochs)
    FROM jobs AS later WHERE later.experiment_id = :experiment_id AND later.kind = 'predict' AND :epochs > 0
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO needs (job_id, needed_id)
    SELECT later.id, earlier.id FROM jobs AS later JOIN jobs AS earlier
        ON earlier.experiment_id = later.experiment_id AND earlier.kind = 'predict'
    WHERE later.experiment_id = :experiment_id AND later.kind = 'record'
    ON CONFLICT DO NOTHING
    """,
)

#: Of a row of jobs: nothing that it needs is still to be done.
HAS_ALL_IT_NEEDS = """
    NOT EXISTS (SELECT 1 FROM needs JOIN jobs AS needed ON needed.id = needs.needed_id
                WHERE needs.job_id = jobs.id AND needed.state NOT IN ('committed', 'skipped'))
"""

_SETTLE = f"""
    UPDATE jobs SET state = 'ready', changed_at = :now, changed_by = :by, changed_why = 'all that it needs is done'
    WHERE experiment_id = :experiment_id AND state = 'waiting' AND {HAS_ALL_IT_NEEDS}
"""  # noqa: S608 - nothing from outside

#: Early stopping: the later epochs of a fold will not be trained.
SKIP_LATER_EPOCHS = """
    UPDATE jobs SET state = 'skipped', changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train' AND epoch > :epoch AND state = 'waiting'
"""


def link(db: Statements, experiment_id: int, *, epochs: int) -> None:
    """Write the edges of an experiment; those that are there already stay."""
    for statement in _LINKS:
        db.execute(statement, {"experiment_id": experiment_id, "epochs": epochs})


def settle(db: Statements, experiment_id: int, *, by: str, now: float) -> None:
    """Make ready every waiting job of an experiment that has all it needs."""
    db.execute(_SETTLE, {"experiment_id": experiment_id, "by": by, "now": now})
