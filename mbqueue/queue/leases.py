"""Claiming a job and everything that only the holder of its lease may do.

Every write here carries the job's id and the fence of the lease; when that changes no row, the lease is lost, and
nothing was written, neither in the database nor (through `publish`) in a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from mbqueue.errors import LeaseLost, QueueError
from mbqueue.queue.database import Part, Statements
from mbqueue.queue.jobs import Job, Kind, Lease

#: Attempts that may end with an error before a job rests in `failed`.
MAX_FAILURES: Final = 5
#: The delay after the first failure; every further one waits four times as long, up to the longest.
RETRY_SECONDS: Final = 30.0
LONGEST_RETRY_SECONDS: Final = 3600.0
#: A job whose holders vanish so often in a row, without any work saved in between, is what kills them.
MAX_LOST_IN_A_ROW: Final = 20
#: Longest lease.
LONGEST_LEASE_SECONDS: Final = 86_400.0
#: A time further ahead than this, longer than any lease or delay by more than clocks may differ, was written by a
#: clock that was wrong, and counts as past.
ABSURD_SECONDS: Final = 2 * LONGEST_LEASE_SECONDS

Publish = Callable[[], None]

# Two searches, each along one index from its head: the fold that this session has loaded, else the best of all.
# A fold that another living session last worked on is left to that one, unless it is busy elsewhere.
# A time absurdly far ahead was written by a wrong clock, and counts as past. Rows that another transaction is just
# changing are passed over.
_CLAIM = """
    UPDATE jobs SET state = 'leased', fence = fence + 1, session_id = :session, affinity = :session, started = 1,
        lease_expires_at = :now + :lease_seconds, not_before = 0,
        changed_at = :now, changed_by = :session, changed_why = 'claimed'
    WHERE id = coalesce(
        (SELECT id FROM jobs
         WHERE state = 'ready' AND paused = 0 AND experiment_id = :experiment_id AND fold = :fold
           AND (not_before <= :now OR not_before > :now + :absurd)
           AND (affinity IS NULL OR affinity = :session
                OR NOT EXISTS (SELECT 1 FROM sessions
                               WHERE sessions.id = affinity AND ended_at IS NULL
                                 AND alive_until > :now AND alive_until <= :now + :absurd)
                OR EXISTS (SELECT 1 FROM jobs AS held WHERE held.state = 'leased' AND held.session_id = jobs.affinity))
         ORDER BY id LIMIT 1 /*pg FOR NO KEY UPDATE SKIP LOCKED */),
        (SELECT id FROM jobs
         WHERE state = 'ready' AND paused = 0
           AND (not_before <= :now OR not_before > :now + :absurd)
           AND (affinity IS NULL OR affinity = :session
                OR NOT EXISTS (SELECT 1 FROM sessions
                               WHERE sessions.id = affinity AND ended_at IS NULL
                                 AND alive_until > :now AND alive_until <= :now + :absurd)
                OR EXISTS (SELECT 1 FROM jobs AS held WHERE held.state = 'leased' AND held.session_id = jobs.affinity))
         ORDER BY priority DESC, started DESC, id LIMIT 1 /*pg FOR NO KEY UPDATE SKIP LOCKED */))
    RETURNING id
"""

_BEAT = """
    UPDATE sessions SET heartbeat_at = :now, alive_until = max(alive_until, :now + :lease_seconds)
    WHERE id = :session AND ended_at IS NULL
"""

_REAP = """
    UPDATE jobs SET
        state = CASE WHEN lost_in_a_row + 1 < :max_lost THEN 'ready' ELSE 'failed' END,
        error = CASE WHEN lost_in_a_row + 1 < :max_lost THEN error ELSE :lost_error END,
        preemptions = preemptions + 1, lost_in_a_row = lost_in_a_row + 1,
        session_id = NULL, lease_expires_at = NULL, affinity = NULL,
        changed_at = :now, changed_by = :by, changed_why = 'lease of session ' || session_id || ' ran out'
    WHERE state = 'leased' AND (lease_expires_at <= :now OR lease_expires_at > :now + :absurd)
      /*pg AND id IN (SELECT id FROM jobs
                      WHERE state = 'leased' AND (lease_expires_at <= :now OR lease_expires_at > :now + :absurd)
                      FOR NO KEY UPDATE SKIP LOCKED) */
"""

LOST_ERROR = (
    f"The lease was lost {MAX_LOST_IN_A_ROW} times in a row without any work saved in between, so the job itself may "
    "be what ends the sessions (out of memory?). Look at the last session's output, then: mbqueue retry"
)

_RENEW = """
    UPDATE jobs SET lease_expires_at = :now + :lease_seconds, progress = coalesce(:progress, progress)
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

_SAVE_PROGRESS = """
    UPDATE jobs SET progress = :progress, lost_in_a_row = 0
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

_COMMIT = """
    UPDATE jobs SET state = 'committed', result = :result, progress = NULL,
        val_mae = json_extract(:result, '$.val_mae'), test_mae = json_extract(:result, '$.test_mae'),
        seconds = json_extract(:result, '$.seconds'), error = NULL, lost_in_a_row = 0,
        session_id = NULL, lease_expires_at = NULL,
        changed_at = :now, changed_by = :session, changed_why = 'committed'
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

# Which of the jobs that need this one now have all they need; those of its own fold stay with its session.
_UNLOCK = """
    UPDATE jobs SET state = 'ready', started = max(started, :started),
        affinity = CASE WHEN fold = :fold THEN :session END,
        changed_at = :now, changed_by = :session, changed_why = 'all that it needs is done'
    WHERE state = 'waiting' AND id IN (SELECT job_id FROM needs WHERE needed_id = :id)
      AND NOT EXISTS (SELECT 1 FROM needs JOIN jobs AS needed ON needed.id = needs.needed_id
                      WHERE needs.job_id = jobs.id AND needed.state NOT IN ('committed', 'skipped'))
"""

_SKIP = """
    UPDATE jobs SET state = 'skipped', changed_at = :now, changed_by = :session, changed_why = :why
    WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train' AND epoch > :epoch AND state = 'waiting'
"""

_RELEASE = """
    UPDATE jobs SET state = 'ready', preemptions = preemptions + :preempted,
        session_id = NULL, lease_expires_at = NULL,
        changed_at = :now, changed_by = :session, changed_why = :why
    WHERE id = :id AND fence = :fence AND state = 'leased'
"""

#: Gives every lease back, of whomever.
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


def retry_delay_seconds(failures: int) -> float:
    """How long a job rests after its `failures`-th failure (1-based): 30 s, 2 min, 8 min, 32 min, then 1 h."""
    return float(min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 4 ** (failures - 1)))


class Leases(Part):
    """Claims and fenced writes."""

    def claim(
        self, session: str, *, now: float, lease_seconds: float, loaded: tuple[int, int] | None = None
    ) -> Lease | None:
        """The job that this session should do next, under a new fence, or None when there is none for it now.

        Before that, leases that ran out are taken back. Order: the fold that the session has `loaded`
        (experiment id, fold); then higher priority; then a fold in progress before a new one; then age. Left out
        are paused jobs, jobs whose next attempt is due later, and those whose fold another living session worked
        on last (unless that one is busy with another job), so that two workers take different folds. The time this
        takes does not grow with the number of jobs. A claim counts as a heartbeat of the session.

        Raises:
            QueueError: when the session does not exist or has ended.
        """
        if not 0 < lease_seconds <= LONGEST_LEASE_SECONDS:
            raise QueueError(f"A lease of {lease_seconds} s is not between 0 and {LONGEST_LEASE_SECONDS:.0f} s.")
        experiment_id, fold = loaded or (None, None)
        with self.writing() as db:
            if not db.execute(_BEAT, {"session": session, "now": now, "lease_seconds": lease_seconds}).rowcount:
                raise QueueError(f"Session {session} has ended or was never started; a worker starts a new one.")
            self._reap_expired(db, by=session, now=now)
            claimed = db.execute(
                _CLAIM,
                {
                    "session": session,
                    "now": now,
                    "lease_seconds": lease_seconds,
                    "absurd": ABSURD_SECONDS,
                    "experiment_id": experiment_id,
                    "fold": fold,
                },
            ).fetchall()
            return self._lease(db, claimed[0]["id"], session) if claimed else None

    def reap_expired(self, *, by: str, now: float) -> int:
        """Take back every lease that ran out, as `claim` does; returns how many."""
        with self.writing() as db:
            return self._reap_expired(db, by=by, now=now)

    def renew(
        self, lease: Lease, *, now: float, lease_seconds: float, progress: Mapping[str, Any] | None = None
    ) -> Lease:
        """The same lease with a later expiry; `job.paused` in it is current. `progress` is shown on the dashboard.

        A lease that has run out, but that nobody has taken back yet, is renewed: the fence shows that no other
        worker came in between.

        Raises:
            LeaseLost: when the job was taken back, claimed by another, cancelled or rewound.
        """
        with self.writing() as db:
            values = {"now": now, "lease_seconds": min(lease_seconds, LONGEST_LEASE_SECONDS)}
            self._fenced(db, _RENEW, lease, {**values, "progress": None if progress is None else _as_json(progress)})
            return self._lease(db, lease.job.id, lease.session)

    def save_progress(self, lease: Lease, *, progress: Mapping[str, Any], publish: Publish | None = None) -> None:
        """Record what is saved of an unfinished job, and call `publish` while the lease is known to be held.

        Raises:
            LeaseLost: when the lease is lost; then `publish` was not called.
        """
        with self.writing() as db:
            self._fenced(db, _SAVE_PROGRESS, lease, {"progress": _as_json(progress)})
            if publish is not None:
                publish()

    def commit(
        self, lease: Lease, *, result: Mapping[str, Any], now: float, publish: Publish | None = None
    ) -> tuple[Job, ...]:
        """Finish the job: check the fence, call `publish`, write `result`, make ready what waited for it.

        All in one write transaction, so nobody can take the job over while `publish` runs; it should only rename
        files. When `publish` raises, nothing is written and the lease is still held. When the process dies between
        `publish` and the end of the transaction, the files are there and the job is still leased: those files are
        legitimate (the fence was checked), and the next holder of the job adopts them.

        The result of a `prepare` job must hold `dataset_hash`.

        Returns:
            The jobs that became ready.

        Raises:
            LeaseLost: when the lease is lost; then `publish` was not called.
            QueueError: when `dataset_hash` is missing or is not the one of an earlier `prepare`.
        """
        # Two that commit at once what the same job needs would each find the other's missing.
        is_needed_with_others = lease.job.kind in {Kind.PREPARE, Kind.PREDICT}
        with self.writing() as db:
            self.database.hold(db, lease.job.experiment_id, shared=not is_needed_with_others)
            self._commit(db, lease, result, now, publish)
            return self._unlock(db, lease, lease.job.id, now)

    def skip_rest(
        self, lease: Lease, *, result: Mapping[str, Any], why: str, now: float, publish: Publish | None = None
    ) -> tuple[Job, ...]:
        """As `commit` for an epoch, and skip all later epochs of its fold (early stopping) in the same transaction.

        Raises:
            LeaseLost: as `commit`.
            QueueError: when the job is not a `train` job.
        """
        job = lease.job
        if job.kind is not Kind.TRAIN:
            raise QueueError(f"{job.label} has no later epochs to skip.")
        with self.writing() as db:
            self.database.hold(db, job.experiment_id, shared=True)
            self._commit(db, lease, result, now, publish)
            place = {"experiment_id": job.experiment_id, "fold": job.fold, "epoch": job.epoch}
            db.execute(_SKIP, {**place, "session": lease.session, "now": now, "why": why})
            last = db.execute(
                "SELECT id FROM jobs WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train' "
                "ORDER BY epoch DESC LIMIT 1",
                {"experiment_id": job.experiment_id, "fold": job.fold},
            ).fetchone()
            return self._unlock(db, lease, last["id"], now)

    def release(self, lease: Lease, *, reason: str, now: float, preempted: bool = False) -> None:
        """Give the job back unfinished; `preempted` counts it as cut off. It is not a failure either way.

        Raises:
            LeaseLost: when the lease is lost.
        """
        with self.writing() as db:
            self._fenced(
                db,
                _RELEASE,
                lease,
                {"now": now, "session": lease.session, "why": f"released: {reason}", "preempted": int(preempted)},
            )

    def fail(self, lease: Lease, *, error: str, now: float, final: bool = False) -> Job:
        """The attempt ended with an error: try again after a growing delay, or rest in `failed` after the fifth.

        `final` says that another attempt would end the same way, and rests it in `failed` at once. `error` (a
        traceback) is kept with the job; its last line goes to the event. A failed job blocks only what needs it.
        Returns the job as it now is.

        Raises:
            LeaseLost: when the lease is lost.
        """
        with self.writing() as db:
            failures = lease.job.failures + 1
            summary = error.strip().splitlines()[-1][:500] if error.strip() else "no message"
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

    def _reap_expired(self, db: Statements, *, by: str, now: float) -> int:
        if not self.database.leases_run_out(db):
            return 0
        return db.execute(
            _REAP,
            {
                "now": now,
                "by": by,
                "absurd": ABSURD_SECONDS,
                "max_lost": MAX_LOST_IN_A_ROW,
                "lost_error": LOST_ERROR,
            },
        ).rowcount

    def _commit(
        self, db: Statements, lease: Lease, result: Mapping[str, Any], now: float, publish: Publish | None
    ) -> None:
        self._fenced(db, _COMMIT, lease, {"result": _as_json(result), "now": now, "session": lease.session})
        if lease.job.kind is Kind.PREPARE:
            self._keep_dataset_hash(db, lease.job, result.get("dataset_hash"))
        if publish is not None:
            publish()

    def _keep_dataset_hash(self, db: Statements, job: Job, dataset_hash: object) -> None:
        if not isinstance(dataset_hash, str):
            raise QueueError(f"The result of {job.label} lacks dataset_hash.")
        place = {"experiment_id": job.experiment_id, "dataset_hash": dataset_hash}
        if not db.execute(_SET_DATASET_HASH, place).rowcount:
            raise QueueError(
                f"The crystals of {job.experiment} have changed since it was first prepared (their hash is now "
                f"{dataset_hash[:16]}). Put the old data back, or enqueue under a new name: mbqueue enqueue --name NAME"
            )

    def _unlock(self, db: Statements, lease: Lease, done_id: int, now: float) -> tuple[Job, ...]:
        job = lease.job
        db.execute(
            _UNLOCK,
            {
                "id": done_id,
                "fold": job.fold,
                "session": lease.session,
                "now": now,
                "started": int(job.kind is not Kind.PREPARE),
            },
        )
        rows = db.execute(
            "SELECT job_rows.* FROM needs JOIN job_rows ON job_rows.id = needs.job_id "
            "WHERE needs.needed_id = :id AND job_rows.state = 'ready' ORDER BY job_rows.id",
            {"id": done_id},
        )
        return tuple(Job.from_row(row) for row in rows)

    def _fenced(self, db: Statements, statement: str, lease: Lease, values: Mapping[str, Any]) -> None:
        """Run a statement that carries id and fence.

        Raises:
            LeaseLost: when it changes no row.
        """
        if db.execute(statement, {**values, "id": lease.job.id, "fence": lease.fence}).rowcount:
            return
        row = db.execute("SELECT state, fence, changed_why FROM jobs WHERE id = ?", (lease.job.id,)).fetchone()
        now_is = f"it is {row['state']} under fence {row['fence']} ({row['changed_why']})" if row else "it is gone"
        raise LeaseLost(
            f"Session {lease.session} no longer holds {lease.job.label} (its fence was {lease.fence}): {now_is}. "
            "Nothing was written."
        )

    def _lease(self, db: Statements, job_id: int, session: str) -> Lease:
        job = Job.from_row(db.execute("SELECT * FROM job_rows WHERE id = ?", (job_id,)).fetchone())
        assert job.lease_expires_at is not None
        return Lease(job=job, session=session, fence=job.fence, expires_at=job.lease_expires_at)


def _as_json(content: Mapping[str, Any]) -> str:
    """Compact JSON.

    Raises:
        QueueError: when there is a nan, an inf or something that is not JSON in it.
    """
    try:
        return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise QueueError(f"What a worker wanted to store is not valid JSON ({error}): {content!r:.500}") from error
