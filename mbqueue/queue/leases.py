"""Operations that only the holder of a lease may perform.

Every write checks the job's id and the fence of the lease. If a write changes no row, the lease is lost: the database
is unchanged, and `publish` was not called.
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

#: A job becomes `failed` after this many failed attempts.
MAX_FAILURES: Final = 5
#: The delay after the first failure. Each later delay is four times the previous delay, up to `LONGEST_RETRY_SECONDS`.
RETRY_SECONDS: Final = 30.0
LONGEST_RETRY_SECONDS: Final = 3600.0
#: The maximum length of an error message in an event, in characters.
_EVENT_LENGTH = 500
Publish = Callable[[], None]

#: One encoder for all calls, because json.dumps creates a new encoder on every call with non-default options.
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

# Marks as ready each job that was waiting only for the committed job. Reserves jobs of the same fold for the session
# that committed the job.
_UNLOCK = f"""
    UPDATE jobs SET state = 'ready', started = CASE WHEN :started = 1 THEN 1 ELSE started END,
        affinity = CASE WHEN fold = :fold THEN :session END,
        changed_at = :now, changed_by = :session, changed_why = 'all that it needs is done'
    WHERE state = 'waiting' AND id IN (SELECT job_id FROM needs WHERE needed_id = :id)
      AND {HAS_ALL_IT_NEEDS}
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
    """The SET clause that stores a job's result, and copies some of the result's numbers into columns of their own."""
    numbers = (f"{name} = {sql.json_number(':result', name)}" for name in ("val_mae", "test_mae", "seconds"))
    return ", ".join(("result = :result", *numbers))


def retry_delay_seconds(failures: int) -> float:
    """The delay in seconds before the next attempt.

    The delay grows with each failure from 30 s to 2 min, 8 min and 32 min, and then stays at 1 h.
    """
    return float(min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 4 ** (failures - 1)))


class Leases(Claims):
    """Writes that require a lease and check its fence."""

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
        """Commit a job and claim the next one in a single transaction, which waits for the disk only once.

        After an epoch, the session claims the next job of the same fold directly if possible, without reclaiming
        expired leases or recording a heartbeat. If the session's last heartbeat is older than half of `lease_seconds`,
        the session makes an ordinary claim.

        Args:
            skip_rest, prunes: as for `commit`.
            reap: whether to reclaim expired leases first, as for `claim`.

        Returns:
            The next lease. None if the session cannot claim a job now, or has ended.

        Raises:
            LeaseLost, QueueError: as for `commit`; no job is claimed.
        """
        job, session = lease.job, lease.session
        with self.writing() as db:
            is_epoch = job.kind is Kind.TRAIN and skip_rest is None
            claim_next = [self._claim_next(job, session, now, lease_seconds)] if is_epoch else []
            given = self._finish(db, lease, result, now, publish, skip_rest, prunes, claim_next)
            found = [row for rows in given for row in rows]
            if not found:
                # Another session that ends this session, because it seems dead, locks the committed job and the next
                # job in a different order. In a deadlock, the server aborts one of the two transactions, and mbqueue
                # retries it.
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

        An expired lease can be renewed until another session reclaims it. The unchanged fence proves that no other
        session has claimed the job. In the same transaction, `renew` checks the fence and then calls `publish`.

        Raises:
            LeaseLost: if the lease was reclaimed, or the job was claimed by another session, cancelled or rewound.
        """
        with self.writing() as db:
            values = {"now": now, "lease_seconds": min(lease_seconds, LONGEST_LEASE_SECONDS)}
            self._fenced(db, _RENEW, lease, {**values, "progress": None if progress is None else _as_json(progress)})
            if publish is not None:
                publish()
            return Lease(job=Job.from_row(db.execute(_ROW, (lease.job.id,)).fetchone()), session=lease.session)

    @repeatable
    def save_progress(self, lease: Lease, *, progress: Mapping[str, Any], publish: Publish | None = None) -> None:
        """Record the progress of an unfinished job, and call `publish` in the same transaction.

        Raises:
            LeaseLost: if the lease is lost. `publish` is not called.
        """
        with self.writing() as db:
            self._fenced(db, _SAVE_PROGRESS, lease, {"progress": _as_json(progress)})
            if publish is not None:
                publish()

    @repeatable
    def commit(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        now: float,
        publish: Publish | None = None,
        skip_rest: str | None = None,
        prunes: bool = False,
    ) -> None:
        """Commit a job: check the fence, call `publish`, store `result`, and mark the next jobs as ready.

        The commit is one write transaction, so no other session can claim the job while `publish` runs. `publish`
        should only rename files, because the database is locked while it runs. If `publish` raises, nothing is written
        and the lease is still held. If the process dies between `publish` and the end of the transaction, the files
        exist and the job is still leased. The job's next holder adopts the published files, which are valid because the
        fence was checked before `publish`.

        The result of a `prepare` job must contain `dataset_hash`.

        Args:
            skip_rest: the reason for skipping all later epochs of the fold (early stopping); None to skip none.
            prunes: whether to prune the whole trial, which skips all its jobs, including the `predict` and `record`
                jobs, except jobs that a session is working on. To prune a trial, pass a `skip_rest` that begins with
                `mbqueue.queue.edges.PRUNED`.

        Raises:
            LeaseLost: if the lease is lost. `publish` is not called.
            QueueError: if `dataset_hash` is missing or differs from that of an earlier `prepare` job; or if `skip_rest`
                is given for a job that is not a `train` job.
        """
        with self.writing() as db:
            self._finish(db, lease, result, now, publish, skip_rest, prunes)
            db.execute(*self._unlocking(db, lease, now, skip_rest))

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
        """Release an unfinished job. With `preempted`, the attempt counts as preempted, not as failed.

        With `for_others`, the fold is no longer reserved for this session, which stays alive but cannot do the job now.
        No session can claim the job for the next `rest_seconds`.

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
        """Record a failed attempt. A job is retried after a growing delay, and becomes `failed` at the fifth failure.

        With `final`, the job becomes `failed` immediately, because another attempt would fail in the same way. `error`
        is a traceback, which is stored with the job; the event contains only its message, cut after 500 characters. A
        failed job blocks only the jobs that need it.

        Returns:
            The job in its new state.

        Raises:
            LeaseLost: if the lease is lost.
        """
        with self.writing() as db:
            failures = lease.job.failures + 1
            message = error_message(error) or "no message"
            summary = message if len(message) <= _EVENT_LENGTH else f"{message[:_EVENT_LENGTH]} …"
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
            return Job.from_row(db.execute(_ROW, (lease.job.id,)).fetchone())

    def _finish(
        self,
        db: Statements,
        lease: Lease,
        result: Mapping[str, Any],
        now: float,
        publish: Publish | None,
        skip_rest: str | None,
        prunes: bool,
        then: Sequence[Bound] = (),
    ) -> list[Rows]:
        """Commit the job and run the statements of ``then``, in one message to the server. Then call ``publish``."""
        job = lease.job
        if skip_rest is not None and job.kind is not Kind.TRAIN:
            raise QueueError(f"{job.label} has no later epochs to skip.")
        # An exclusive lock keeps two simultaneous commits from missing each other's changes. Without the lock, a job
        # that needs both committed jobs could stay `waiting`.
        is_alone = skip_rest is None and job.kind not in {Kind.PREPARE, Kind.PREDICT}
        hold = self.database.holding(job.experiment_id, shared=is_alone)
        values = {"result": _as_json(result), "now": now, "session": lease.session, "id": job.id, "fence": lease.fence}
        given = self.database.together(db, [*hold, (_commit_statement, values), *then])[len(hold) :]
        if not given[0].rowcount:
            raise lease_lost(db, lease)
        if job.kind is Kind.PREPARE:
            self._keep_dataset_hash(db, job, result.get("dataset_hash"))
        if publish is not None:
            publish()
        if prunes:
            how = {"now": now, "by": lease.session, "why": skip_rest}
            db.execute(SKIP_ALL, {"experiment_id": job.experiment_id, **how})
        return given[1:]

    def _keep_dataset_hash(self, db: Statements, job: Job, dataset_hash: object) -> None:
        if not isinstance(dataset_hash, str):
            raise QueueError(f"The result of {job.label} lacks dataset_hash.")
        scope = {"experiment_id": job.experiment_id, "dataset_hash": dataset_hash}
        if not db.execute(_SET_DATASET_HASH, scope).rowcount:
            raise QueueError(
                f"The crystals of {job.experiment} have changed since the experiment was first prepared (their hash is "
                f"now {dataset_hash[:16]}). Put the old data back, then run mbqueue retry {job.experiment}. "
                "Or enqueue the experiment under a new name (--name)."
            )

    def _unlocking(self, db: Statements, lease: Lease, now: float, skip_rest: str | None) -> Bound:
        """Return the statement that unblocks the next jobs; with ``skip_rest``, first skip the later epochs."""
        job, done = lease.job, lease.job.id
        if skip_rest is not None:
            scope = {"experiment_id": job.experiment_id, "fold": job.fold}
            how = {"epoch": job.epoch, "by": lease.session, "now": now, "why": skip_rest}
            db.execute(SKIP_LATER_EPOCHS, {**scope, **how})
            done = db.execute(_LAST_EPOCH, scope).fetchone()["id"]
        started = int(job.kind is not Kind.PREPARE)
        return _UNLOCK, {"id": done, "fold": job.fold, "session": lease.session, "now": now, "started": started}

    def _fenced(self, db: Statements, statement: str, lease: Lease, values: Mapping[str, Any]) -> None:
        if not db.execute(statement, {**values, "id": lease.job.id, "fence": lease.fence}).rowcount:
            raise lease_lost(db, lease)


def lease_lost(db: Statements, lease: Lease) -> LeaseLost:
    """Make the error for a session that no longer holds a job."""
    row = db.execute("SELECT state, fence, changed_why FROM jobs WHERE id = ?", (lease.job.id,)).fetchone()
    now_is = f"the job is {row['state']}, fence {row['fence']} ({row['changed_why']})" if row else "it is gone"
    return LeaseLost(
        f"Session {lease.session} no longer holds {lease.job.label} (its fence was {lease.fence}): {now_is}. "
        "Nothing was written."
    )


def _as_json(content: Mapping[str, Any]) -> str:
    try:
        return _ENCODER.encode(content)
    except (TypeError, ValueError) as error:
        raise QueueError(f"A worker's result is not valid JSON ({error}): {content!r:.500}") from error
