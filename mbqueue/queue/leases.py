"""Operations that only the holder of a lease may perform.

Every write here carries the job's id and the fence of the lease. If a write changes no row, the lease is lost: the
database is unchanged, and `publish` was not called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mbqueue.errors import LeaseLost, QueueError
from mbqueue.queue.claiming import LONGEST_LEASE_SECONDS, Claims, lease_of
from mbqueue.queue.database import Bound, Rows, Statements, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.edges import HAS_ALL_IT_NEEDS, SKIP_ALL, SKIP_LATER_EPOCHS
from mbqueue.queue.jobs import Job, Kind, Lease, error_message

#: How many attempts may fail before a job becomes `failed`.
MAX_FAILURES: Final = 5
#: The delay after the first failure; each further delay is four times as long, up to the longest.
RETRY_SECONDS: Final = 30.0
LONGEST_RETRY_SECONDS: Final = 3600.0
Publish = Callable[[], None]

#: One encoder for all calls: with non-default options, json.dumps would make a new encoder each time.
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))

_ROW = "SELECT * FROM job_rows WHERE id = ?"

_RENEW = """
    UPDATE jobs SET lease_expires_at = :now + :lease_seconds, progress = coalesce(:progress, progress)
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

_SAVE_PROGRESS = """
    UPDATE jobs SET progress = :progress, lost_in_a_row = 0
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

# Makes the jobs ready that needed only this job; jobs of the same fold stay with this session.
_UNLOCK = f"""
    UPDATE jobs SET state = 'ready', started = CASE WHEN :started = 1 THEN 1 ELSE started END,
        affinity = CASE WHEN fold = :fold THEN :session END,
        changed_at = :now, changed_by = :session, changed_why = 'all that it needs is done'
    WHERE state = 'waiting' AND id IN (SELECT job_id FROM needs WHERE needed_id = :id)
      AND {HAS_ALL_IT_NEEDS}
"""

_OPENED = """
    SELECT job_rows.* FROM needs JOIN job_rows ON job_rows.id = needs.job_id
    WHERE needs.needed_id = :id AND job_rows.state = 'ready' ORDER BY job_rows.id
"""

_LAST_EPOCH = """
    SELECT id FROM jobs WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train'
    ORDER BY epoch DESC LIMIT 1
"""

_RELEASE = """
    UPDATE jobs SET state = 'ready', preemptions = preemptions + :preempted,
        session_id = NULL, lease_expires_at = NULL, affinity = CASE WHEN :for_others = 0 THEN affinity END,
        not_before = CASE WHEN :rests = 1 THEN :now + :rest_seconds ELSE not_before END,
        changed_at = :now, changed_by = :session, changed_why = :why
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

#: Releases every lease of every session.
LEASE_GIVEN_UP = """
    UPDATE jobs SET state = 'ready', session_id = NULL, lease_expires_at = NULL, affinity = NULL,
        changed_at = :now, changed_by = :by, changed_why = :why
    WHERE state = 'leased'
"""

_FAIL = """
    UPDATE jobs SET
        state = CASE WHEN :final = 1 OR failures + 1 >= :max_failures THEN 'failed' ELSE 'ready' END,
        not_before = CASE WHEN :final = 1 OR failures + 1 >= :max_failures THEN 0 ELSE :now + :delay END,
        failures = failures + 1, error = :error, session_id = NULL, lease_expires_at = NULL, affinity = NULL,
        changed_at = :now, changed_by = :session, changed_why = :why
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

_SET_DATASET_HASH = """
    UPDATE experiments SET dataset_hash = :dataset_hash
    WHERE id = :experiment_id AND (dataset_hash IS NULL OR dataset_hash = :dataset_hash)
"""


def _commit_statement(sql: Dialect) -> str:
    return f"""
        UPDATE jobs SET state = 'committed', {result_columns(sql)}, progress = NULL, error = NULL, lost_in_a_row = 0,
            session_id = NULL, lease_expires_at = NULL,
            changed_at = :now, changed_by = :session, changed_why = 'committed'
        WHERE id = :id AND fence = :fence AND state = 'leased'
    """


def result_columns(sql: Dialect) -> str:
    """The SET clause of an UPDATE of jobs: sets the result, and the columns that repeat numbers of the result."""
    numbers = (f"{name} = {sql.json_number(':result', name)}" for name in ("val_mae", "test_mae", "seconds"))
    return ", ".join(("result = :result", *numbers))


def retry_delay_seconds(failures: int) -> float:
    """The delay after the `failures`-th failure (1-based): 30 s, 2 min, 8 min, 32 min, then 1 h."""
    return float(min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 4 ** (failures - 1)))


class Leases(Claims):
    """Fenced writes."""

    @repeatable
    def commit_and_claim(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        now: float,
        lease_seconds: float,
        publish: Publish | None = None,
        skip_rest: str | None = None,
        prunes: bool = False,
        reap: bool = True,
    ) -> Lease | None:
        """Commit a job and claim the next one in a single transaction, which waits for the disk once instead of twice.

        After an epoch, the next job of its fold is claimed directly. A direct claim takes back no expired leases. A
        direct claim counts as a heartbeat only if the session's last one is older than half of `lease_seconds`.

        Args:
            skip_rest, prunes: if given, skip jobs as the method `skip_rest` does, for this reason.
            reap: whether to take back expired leases first, as for `claim`.

        Returns:
            The next lease, or None if there is no job for this session now or the session has ended.

        Raises:
            LeaseLost, QueueError: as for `commit`; then nothing was claimed.
        """
        job, session = lease.job, lease.session
        with self.writing() as db:
            is_epoch = job.kind is Kind.TRAIN and skip_rest is None
            claim_next = [self._claim_next(job, session, now, lease_seconds)] if is_epoch else []
            given = self._finish(db, lease, result, now, publish, skip_rest, claim_next)
            if prunes and skip_rest is not None:
                self._prune(db, lease, now, skip_rest)
            found = [row for rows in given for row in rows]
            if not found:
                # If another session ends this one as dead, it takes these locks in another order, and one of the two
                # starts over.
                beat, open_next = self._beat(session, now, lease_seconds), self._unlocking(db, lease, now, skip_rest)
                loaded = None if job.fold is None else (job.experiment_id, job.fold)
                claim = self._claim(session, now, lease_seconds, loaded)
                taking_back = self._reap(db, by=session, now=now) if reap else ()
                *_, claimed = self.database.together(db, [beat, open_next, *taking_back, claim])
                found = claimed.fetchall()
        return lease_of(found, session)

    @repeatable
    def renew(
        self,
        lease: Lease,
        *,
        now: float,
        lease_seconds: float,
        progress: Mapping[str, Any] | None = None,
        publish: Publish | None = None,
    ) -> Lease:
        """Renew the lease; return it with a later expiry and the current `job.paused`. The dashboard shows `progress`.

        An expired lease can be renewed until a session takes it back: the fence proves that no other worker had the
        job. `publish` is called while the lease is known to be held.

        Raises:
            LeaseLost: if the job was taken back, claimed by another session, cancelled or rewound.
        """
        with self.writing() as db:
            values = {"now": now, "lease_seconds": min(lease_seconds, LONGEST_LEASE_SECONDS)}
            self._fenced(db, _RENEW, lease, {**values, "progress": None if progress is None else _as_json(progress)})
            if publish is not None:
                publish()
            found = db.execute(_ROW, (lease.job.id,)).fetchall()
        renewed = lease_of(found, lease.session)
        assert renewed is not None
        return renewed

    @repeatable
    def save_progress(self, lease: Lease, *, progress: Mapping[str, Any], publish: Publish | None = None) -> None:
        """Record the progress of an unfinished job, and call `publish` while the lease is known to be held.

        Raises:
            LeaseLost: if the lease is lost; then `publish` was not called.
        """
        with self.writing() as db:
            self._fenced(db, _SAVE_PROGRESS, lease, {"progress": _as_json(progress)})
            if publish is not None:
                publish()

    @repeatable
    def commit(
        self, lease: Lease, *, result: Mapping[str, Any], now: float, publish: Publish | None = None
    ) -> tuple[Job, ...]:
        """Finish the job: check the fence, call `publish`, write `result`, and make jobs that waited for it ready.

        A single write transaction does all of this, so no session can take the job over while `publish` runs. `publish`
        should only rename files, since the database is locked meanwhile. If `publish` raises, nothing is written and
        the lease is still held. If the process dies between `publish` and the end of the transaction, the files exist
        and the job is still leased. Files published in this way are valid, because the fence was checked. The next
        holder of the job adopts them.

        The result of a `prepare` job must hold `dataset_hash`.

        Returns:
            The jobs that became ready.

        Raises:
            LeaseLost: if the lease is lost; then `publish` was not called.
            QueueError: if `dataset_hash` is missing or differs from that of an earlier `prepare`.
        """
        with self.writing() as db:
            self._finish(db, lease, result, now, publish, None)
            return self._unlock(db, lease, now, None)

    @repeatable
    def skip_rest(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        why: str,
        now: float,
        publish: Publish | None = None,
        prunes: bool = False,
    ) -> tuple[Job, ...]:
        """Commit an epoch, and in the same transaction skip all later epochs of its fold (early stopping).

        With ``prunes``, prune the whole trial: skip all its jobs that no session is working on, including predictions
        and record. ``why`` then begins with `mbqueue.queue.edges.PRUNED`.

        Raises:
            LeaseLost: as for `commit`.
            QueueError: if the job is not a `train` job.
        """
        with self.writing() as db:
            self._finish(db, lease, result, now, publish, why)
            if prunes:
                self._prune(db, lease, now, why)
            return self._unlock(db, lease, now, why)

    @repeatable
    def release(
        self,
        lease: Lease,
        *,
        reason: str,
        now: float,
        preempted: bool = False,
        for_others: bool = False,
        rest_seconds: float = 0.0,
    ) -> None:
        """Release the job unfinished; with `preempted`, count the attempt as preempted. A released job has not failed.

        `for_others` is for a session that stays alive but cannot do the job now: other sessions may then claim the
        fold. No session claims the job before `rest_seconds` are over.

        Raises:
            LeaseLost: if the lease is lost.
        """
        with self.writing() as db:
            how = {"preempted": int(preempted), "for_others": int(for_others)}
            rest = {"rests": int(rest_seconds > 0), "rest_seconds": rest_seconds}
            values = {"now": now, "session": lease.session, "why": f"released: {reason}", **how, **rest}
            self._fenced(db, _RELEASE, lease, values)

    @repeatable
    def fail(self, lease: Lease, *, error: str, now: float, final: bool = False) -> Job:
        """Record that the attempt failed: retry after a growing delay, or become `failed` after the fifth failure.

        `final` means that another attempt would end the same way: the job becomes `failed` at once. `error` (a
        traceback) is kept with the job, and its message goes into the event. A failed job blocks only the jobs that
        need it. Returns the job as it is now.

        Raises:
            LeaseLost: if the lease is lost.
        """
        with self.writing() as db:
            failures = lease.job.failures + 1
            summary = error_message(error)[:500] or "no message"
            attempt = "final" if final else f"{failures} of {MAX_FAILURES}"
            self._fenced(
                db,
                _FAIL,
                lease,
                {
                    "now": now,
                    "session": lease.session,
                    "error": error,
                    "why": f"failed ({attempt}): {summary}",
                    "final": int(final),
                    "max_failures": MAX_FAILURES,
                    "delay": retry_delay_seconds(failures),
                },
            )
            return Job.from_row(db.execute("SELECT * FROM job_rows WHERE id = ?", (lease.job.id,)).fetchone())

    def _finish(
        self,
        db: Statements,
        lease: Lease,
        result: Mapping[str, Any],
        now: float,
        publish: Publish | None,
        skip_rest: str | None,
        then: Sequence[Bound] = (),
    ) -> list[Rows]:
        """Commit the job, run the statements in ``then`` in the same message, and publish; return the results."""
        job = lease.job
        if skip_rest is not None and job.kind is not Kind.TRAIN:
            raise QueueError(f"{job.label} has no later epochs to skip.")
        # Without the lock, two concurrent commits that the same job needs would each find the other missing.
        is_alone = skip_rest is None and job.kind not in {Kind.PREPARE, Kind.PREDICT}
        hold = self.database.holding(job.experiment_id, shared=is_alone)
        values = {"result": _as_json(result), "now": now, "session": lease.session, "id": job.id, "fence": lease.fence}
        given = self.database.together(db, [*hold, (_commit_statement, values), *then])[len(hold) :]
        self._require_held(db, lease, given[0])
        if job.kind is Kind.PREPARE:
            self._keep_dataset_hash(db, job, result.get("dataset_hash"))
        if publish is not None:
            publish()
        return given[1:]

    def _keep_dataset_hash(self, db: Statements, job: Job, dataset_hash: object) -> None:
        if not isinstance(dataset_hash, str):
            raise QueueError(f"The result of {job.label} lacks dataset_hash.")
        scope = {"experiment_id": job.experiment_id, "dataset_hash": dataset_hash}
        if not db.execute(_SET_DATASET_HASH, scope).rowcount:
            raise QueueError(
                f"The crystals of {job.experiment} have changed since it was first prepared (their hash is now "
                f"{dataset_hash[:16]}). Put the old data back, or enqueue it under a new name (--name)."
            )

    def _prune(self, db: Statements, lease: Lease, now: float, why: str) -> None:
        values = {"experiment_id": lease.job.experiment_id, "now": now, "by": lease.session, "why": why}
        db.execute(SKIP_ALL, values)

    def _unlocking(self, db: Statements, lease: Lease, now: float, skip_rest: str | None) -> Bound:
        """Statements that make the jobs waiting for this job ready; ``skip_rest`` first skips later epochs."""
        job, done = lease.job, lease.job.id
        if skip_rest is not None:
            scope = {"experiment_id": job.experiment_id, "fold": job.fold}
            how = {"epoch": job.epoch, "by": lease.session, "now": now, "why": skip_rest}
            db.execute(SKIP_LATER_EPOCHS, {**scope, **how})
            done = db.execute(_LAST_EPOCH, scope).fetchone()["id"]
        started = int(job.kind is not Kind.PREPARE)
        return _UNLOCK, {"id": done, "fold": job.fold, "session": lease.session, "now": now, "started": started}

    def _unlock(self, db: Statements, lease: Lease, now: float, skip_rest: str | None) -> tuple[Job, ...]:
        statement, values = self._unlocking(db, lease, now, skip_rest)
        _, rows = self.database.together(db, [(statement, values), (_OPENED, values)])
        return tuple(Job.from_row(row) for row in rows)

    def _fenced(self, db: Statements, statement: str, lease: Lease, values: Mapping[str, Any]) -> None:
        """Run a statement that is fenced by id and fence.

        Raises:
            LeaseLost: if it changes no row.
        """
        self._require_held(db, lease, db.execute(statement, {**values, "id": lease.job.id, "fence": lease.fence}))

    def _require_held(self, db: Statements, lease: Lease, written: Rows) -> None:
        if written.rowcount:
            return
        row = db.execute("SELECT state, fence, changed_why FROM jobs WHERE id = ?", (lease.job.id,)).fetchone()
        now_is = f"it is {row['state']} under fence {row['fence']} ({row['changed_why']})" if row else "it is gone"
        raise LeaseLost(
            f"Session {lease.session} no longer holds {lease.job.label} (its fence was {lease.fence}): {now_is}. "
            "Nothing was written."
        )


def _as_json(content: Mapping[str, Any]) -> str:
    """Compact JSON.

    Raises:
        QueueError: if it contains nan, inf or anything else that is not JSON.
    """
    try:
        return _ENCODER.encode(content)
    except (TypeError, ValueError) as error:
        raise QueueError(f"A worker's result is not valid JSON ({error}): {content!r:.500}") from error
