"""Pause, resume, cancel, retry and rewind jobs, and set their priorities.

Each method changes an experiment or one of its folds. `by` names the user or command in the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypedDict

from mbqueue.errors import RewoundBefore, UsageError
from mbqueue.queue.database import Part, Statements, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.edges import REWIND, settle
from mbqueue.queue.enqueueing import find_experiment, require_priority
from mbqueue.queue.jobs import Lease
from mbqueue.queue.leases import lease_lost
from mbqueue.queue.notes import note
from mbqueue.queue.pruning import take_up

#: How many times sessions may rewind a job between two commits or retries.
MAX_REWINDS: Final = 5

_PAUSE_JOBS = """
    UPDATE jobs SET paused = :paused
    WHERE experiment_id = :experiment_id AND (:fold IS NULL OR fold = :fold) AND paused <> :paused
"""

_SET_PRIORITY = """
    UPDATE jobs SET priority = :priority
    WHERE experiment_id = :experiment_id AND (:fold IS NULL OR fold = :fold) AND priority <> :priority
"""

_CANCEL = """
    UPDATE jobs SET state = 'cancelled', session_id = NULL, lease_expires_at = NULL,
        changed_at = :now, changed_by = :by, changed_why = 'cancelled'
    WHERE experiment_id = :experiment_id AND (:fold IS NULL OR fold = :fold)
      AND state IN ('waiting', 'ready', 'leased', 'failed')
"""

# `record` covers all folds, so a retry of any fold also retries `record`.
_RETRY = """
    UPDATE jobs SET state = 'waiting', failures = 0, lost_in_a_row = 0, not_before = 0,
        changed_at = :now, changed_by = :by, changed_why = 'retried'
    WHERE experiment_id = :experiment_id AND (:fold IS NULL OR fold = :fold OR kind = 'record')
      AND state IN ('failed', 'cancelled')
"""

_HURRY = """
    UPDATE jobs SET not_before = 0
    WHERE experiment_id = :experiment_id AND (:fold IS NULL OR fold = :fold) AND state = 'ready' AND not_before > 0
"""

# Counts how many times sessions have rewound a job since its last commit or retry (`times`). `same` counts only the
# rewinds by this session for this reason.
_REWOUND = """
    SELECT count(*) AS times, coalesce(sum(CASE WHEN by = :session AND why = :why THEN 1 ELSE 0 END), 0) AS same
    FROM events
    WHERE experiment_id = :experiment_id AND job_id = :id AND from_state = 'leased' AND to_state = 'waiting'
      AND by = (SELECT claim.by FROM events AS claim
                WHERE claim.experiment_id = :experiment_id AND claim.job_id = :id AND claim.to_state = 'leased'
                  AND claim.id < events.id
                ORDER BY claim.id DESC LIMIT 1)
      AND id > coalesce((SELECT max(id) FROM events AS earlier
                         WHERE earlier.experiment_id = :experiment_id AND earlier.job_id = :id
                           AND (earlier.to_state = 'committed' OR earlier.from_state IN ('failed', 'cancelled'))), 0)
"""


def _held(sql: Dialect) -> str:
    return f"SELECT 1 FROM jobs WHERE id = ? AND fence = ? AND state = 'leased' {sql.lock}"


class _Scope(TypedDict):
    experiment_id: int
    fold: int | None


class Steering(Part):
    @repeatable
    def pause(self, experiment: str, *, now: float, fold: int | None = None, by: str = "pause") -> int:
        """Pause an experiment or fold, so that sessions do not claim its jobs.

        A running job continues; its session sees the pause when it renews the lease.

        Returns:
            The number of changed jobs.

        Raises:
            UsageError: if there is no such experiment or fold, as in every method of this class.
        """
        return self._set_paused(experiment, fold, paused=True, by=by, now=now)

    @repeatable
    def resume(self, experiment: str, *, now: float, fold: int | None = None, by: str = "resume") -> int:
        """Undo `pause`, and return the number of changed jobs."""
        return self._set_paused(experiment, fold, paused=False, by=by, now=now)

    @repeatable
    def set_priority(
        self, experiment: str, priority: int, *, now: float, fold: int | None = None, by: str = "priority"
    ) -> int:
        """Set the priority, and return the number of changed jobs. Jobs with a higher priority are claimed first.

        Raises:
            UsageError: if the priority is out of bounds, or there is no such experiment or fold.
        """
        require_priority(priority)
        with self.writing() as db:
            scope = _scope(db, experiment, fold)
            if fold is None:
                db.execute("UPDATE experiments SET priority = ? WHERE id = ?", (priority, scope["experiment_id"]))
            changed = db.execute(_SET_PRIORITY, {**scope, "priority": priority}).rowcount
            if changed:
                _note(db, scope, f"priority set to {priority}", by=by, now=now)
            return changed

    @repeatable
    def cancel(self, experiment: str, *, now: float, fold: int | None = None, by: str = "cancel") -> int:
        """Cancel all unfinished jobs of an experiment or fold. Sessions lose their leases on cancelled jobs.

        Returns:
            The number of cancelled jobs.
        """
        with self.writing() as db:
            return db.execute(_CANCEL, {**_scope(db, experiment, fold), "now": now, "by": by}).rowcount

    @repeatable
    def retry(self, experiment: str, *, now: float, fold: int | None = None, by: str = "retry") -> int:
        """Retry failed and cancelled jobs, and reset their failure counts. Let sessions claim delayed jobs immediately.

        A pruned trial resumes as a whole, and is not pruned again. A trial whose checkpoints have been discarded
        (`Pruning.discard_checkpoints`) starts from the beginning.

        Returns:
            The number of changed jobs.
        """
        with self.writing() as db:
            scope = _scope(db, experiment, fold)
            changed = db.execute(_RETRY, {**scope, "now": now, "by": by}).rowcount
            changed += db.execute(_HURRY, scope).rowcount
            changed += take_up(db, scope["experiment_id"], by=by, now=now)
            settle(db, scope["experiment_id"], by=by, now=now)
            return changed

    @repeatable
    def rewind(
        self,
        experiment: str,
        folds: Mapping[int, str],
        *,
        to_epoch: int,
        now: float,
        lease: Lease | None = None,
        by: str = "rewind",
    ) -> int:
        """Rewind `folds` to `to_epoch` (0 for the start), because their files are damaged.

        All later epochs, the folds' `predict` jobs and the `record` job return to the state `waiting`, and sessions
        lose their leases on these jobs. The epoch after `to_epoch` becomes ready. Failed and cancelled jobs stay as
        they are.

        A worker that has found damage passes its `lease` on one of the rewound jobs, and `rewind` ends the worker's
        lease. If the worker's next claim passes the fold as `loaded`, the claim gets epoch `to_epoch + 1`. `rewind`
        fails if the same session finds the same damage again, because training again would not help. `rewind` also
        fails if sessions have rewound the job `MAX_REWINDS` times without committing it.

        Args:
            folds: maps each fold to the reason for its rewind; if empty, nothing changes.

        Returns:
            The number of rewound jobs.

        Raises:
            LeaseLost: if `lease` is lost. Nothing is changed.
            RewoundBefore: if the same session has found the same damage before, or after `MAX_REWINDS` rewinds. Nothing
                is changed, and the session keeps the lease.
        """
        if not folds:
            return 0
        with self.writing() as db:
            scopes = [(_scope(db, experiment, fold), why) for fold, why in folds.items()]
            if lease is not None:
                if db.execute(_held, (lease.job.id, lease.fence)).fetchone() is None:
                    raise lease_lost(db, lease)
                _require_progress(db, lease, next(iter(folds.values())))
                by = lease.session
            how = {"to_epoch": to_epoch, "now": now, "by": by}
            changed = sum(db.execute(REWIND, {**scope, "why": why, **how}).rowcount for scope, why in scopes)
            settle(db, scopes[0][0]["experiment_id"], by=by, now=now)
            return changed

    def _set_paused(self, experiment: str, fold: int | None, *, paused: bool, by: str, now: float) -> int:
        with self.writing() as db:
            scope = _scope(db, experiment, fold)
            if fold is None:
                db.execute("UPDATE experiments SET paused = ? WHERE id = ?", (int(paused), scope["experiment_id"]))
            changed = db.execute(_PAUSE_JOBS, {**scope, "paused": int(paused)}).rowcount
            if changed:
                _note(db, scope, "paused" if paused else "resumed", by=by, now=now)
            return changed


def _scope(db: Statements, experiment: str, fold: int | None) -> _Scope:
    scope: _Scope = {"experiment_id": find_experiment(db, experiment, to_change=True).id, "fold": fold}
    if fold is not None:
        query = "SELECT 1 FROM jobs WHERE experiment_id = :experiment_id AND fold = :fold LIMIT 1"
        if db.execute(query, scope).fetchone() is None:
            raise UsageError(
                f"{experiment} has no fold {fold} in the queue. Add the fold: mbqueue enqueue --folds {fold}"
            )
    return scope


def _note(db: Statements, scope: _Scope, why: str, *, by: str, now: float) -> None:
    where = "" if scope["fold"] is None else f"fold {scope['fold']} "
    note(db, where + why, by=by, now=now, experiment_id=scope["experiment_id"])


def _require_progress(db: Statements, lease: Lease, why: str) -> None:
    job = lease.job
    scope = {"experiment_id": job.experiment_id, "id": job.id}
    rewound = db.execute(_REWOUND, {**scope, "session": lease.session, "why": why}).fetchone()
    if rewound["same"]:
        raise RewoundBefore(
            f"{job.label}: {why} The same damage was found before, and recreating the files did not help. "
            f"Fix the cause, then run: mbqueue retry {job.experiment}"
        )
    if rewound["times"] >= MAX_REWINDS:
        raise RewoundBefore(
            f"{job.label}: {why} The job's input was damaged and recreated {rewound['times']} times in a row. Check "
            f"the disk, then run: mbqueue retry {job.experiment}"
        )
