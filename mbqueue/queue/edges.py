"""Record which jobs each job needs, and mark a job as ready once all jobs that it needs are done."""

from __future__ import annotations

from collections.abc import Iterator

from mbqueue.queue.database import Statements
from mbqueue.queue.dialect import Dialect


# The edges: prepare → first job of each fold; train n → train n + 1; last train → predict; every predict → record.
# `fold_before` uses a subquery, because with a join, both databases may scan all epochs of a fold once for each epoch.
# The plus sign in "+later.fold" is needed because SQLite does not use an index on an expression in a comparison with a
# plain column.
def _links(sql: Dialect) -> Iterator[str]:
    fold, epoch = f"{sql.or_else}(earlier.fold, -1)", f"{sql.or_else}(earlier.epoch, -1)"
    fold_before = f"""
        INSERT INTO needs (job_id, needed_id)
        SELECT later.id, (SELECT id FROM jobs AS earlier
                          WHERE earlier.experiment_id = later.experiment_id AND earlier.kind = 'train'
                            AND {fold} = +later.fold AND {epoch} = {{epoch}})
        FROM jobs AS later WHERE later.experiment_id = :experiment_id AND {{later}}
        ON CONFLICT DO NOTHING
    """
    yield f"""
        INSERT INTO needs (job_id, needed_id)
        SELECT later.id, earlier.id FROM jobs AS later JOIN jobs AS earlier
            ON earlier.experiment_id = later.experiment_id AND earlier.kind = 'prepare' AND {fold} = -1 AND {epoch} = -1
        WHERE later.experiment_id = :experiment_id
          AND ((later.kind = 'train' AND later.epoch = 1) OR (later.kind = 'predict' AND :epochs = 0))
        ON CONFLICT DO NOTHING
    """
    yield fold_before.format(epoch="later.epoch - 1", later="later.kind = 'train' AND later.epoch > 1")
    yield fold_before.format(epoch=":epochs", later="later.kind = 'predict' AND :epochs > 0")
    yield """
        INSERT INTO needs (job_id, needed_id)
        SELECT later.id, earlier.id FROM jobs AS later JOIN jobs AS earlier
            ON earlier.experiment_id = later.experiment_id AND earlier.kind = 'predict'
        WHERE later.experiment_id = :experiment_id AND later.kind = 'record'
        ON CONFLICT DO NOTHING
    """


#: An SQL condition on a row of `jobs`, which is true if every job that this job needs is committed or skipped.
HAS_ALL_IT_NEEDS = """
    NOT EXISTS (SELECT 1 FROM needs JOIN jobs AS needed ON needed.id = needs.needed_id
                WHERE needs.job_id = jobs.id AND needed.state NOT IN ('committed', 'skipped'))
"""

_SETTLE = f"""
    UPDATE jobs SET state = 'ready', changed_at = :now, changed_by = :by, changed_why = 'all that it needs is done'
    WHERE experiment_id = :experiment_id AND state = 'waiting' AND {HAS_ALL_IT_NEEDS}
"""

SKIP_LATER_EPOCHS = """
    UPDATE jobs SET state = 'skipped', changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train' AND epoch > :epoch AND state = 'waiting'
"""

REWIND = """
    UPDATE jobs SET state = 'waiting', result = NULL, val_mae = NULL, test_mae = NULL, seconds = NULL,
        progress = NULL, not_before = 0,
        session_id = NULL, lease_expires_at = NULL,
        changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND state IN ('ready', 'leased', 'committed', 'skipped')
      AND ((fold = :fold AND (kind = 'predict' OR (kind = 'train' AND epoch > :to_epoch))) OR kind = 'record')
"""

#: Skips every job of a pruned trial, except jobs that a session is working on.
SKIP_ALL = """
    UPDATE jobs SET state = 'skipped', changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND state IN ('waiting', 'ready')
"""

#: The reason for skipping a pruned trial's jobs begins with this text. `retry` recognises pruned jobs by this text.
PRUNED = "pruned: "


def link(db: Statements, sql: Dialect, experiment_id: int, *, epochs: int) -> None:
    """Record for each job of an experiment which jobs it needs. Keep existing records."""
    for statement in _links(sql):
        db.execute(statement, {"experiment_id": experiment_id, "epochs": epochs})


def settle(db: Statements, experiment_id: int, *, by: str, now: float) -> None:
    """Mark each waiting job of an experiment as ready if all jobs that it needs are done."""
    db.execute(_SETTLE, {"experiment_id": experiment_id, "by": by, "now": now})
