"""Choose the job that a session claims, and reclaim expired leases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from mbqueue.errors import QueueError
from mbqueue.queue.database import Bound, Part, Row, Statements, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.edges import HAS_ALL_IT_NEEDS
from mbqueue.queue.jobs import Job, Lease

#: If this many sessions in a row die on a job without saving any work, the job itself probably kills them.
MAX_LOST_IN_A_ROW: Final = 20
#: The longest lease, in seconds. Requests for longer leases are shortened.
LONGEST_LEASE_SECONDS: Final = 86_400.0
#: No lease or delay ends more than this many seconds from now, even if clocks differ. A time beyond this limit must
#: come from a wrong clock, so mbqueue treats that time as already past.
ABSURD_SECONDS: Final = 2 * LONGEST_LEASE_SECONDS

_TAKE = """
    UPDATE jobs SET state = 'leased', fence = fence + 1, session_id = :session, affinity = :session, started = 1,
        lease_expires_at = :now + :lease_seconds, not_before = 0,
        changed_at = :now, changed_by = :session, changed_why = 'claimed'
"""

_TAKEN = "RETURNING *, (SELECT name FROM experiments WHERE experiments.id = experiment_id) AS experiment"

# A claim searches first among the jobs of the fold that the session has loaded, and then among all jobs. Each search
# reads an index in order and stops at the first match. A claim skips a fold while the session that last worked on the
# fold is live and idle.
_FREE = """
    state = 'ready' AND paused = 0
       AND (not_before <= :now OR not_before > :now + :absurd)
       AND (affinity IS NULL OR affinity = :session
            OR NOT EXISTS (SELECT 1 FROM sessions
                           WHERE sessions.id = affinity AND ended_at IS NULL
                             AND alive_until > :now AND alive_until <= :now + :absurd)
            OR EXISTS (SELECT 1 FROM jobs AS held WHERE held.state = 'leased' AND held.session_id = jobs.affinity))
"""


def _claim_statement(sql: Dialect) -> str:
    return f"""{_TAKE}
        WHERE id = coalesce(
            (SELECT id FROM jobs WHERE experiment_id = :experiment_id AND fold = :fold AND {_FREE}
             ORDER BY id LIMIT 1 {sql.skip_locked}),
            (SELECT id FROM jobs WHERE {_FREE}
             ORDER BY priority DESC, started DESC, id LIMIT 1 {sql.skip_locked}))
          AND EXISTS (SELECT 1 FROM sessions WHERE sessions.id = :session AND sessions.ended_at IS NULL)
        {_TAKEN}
    """


# Claims the job that needs the committed epoch, if an ordinary claim would choose the same job. The claimed job goes
# directly from waiting to leased, because marking it as ready first would update its row and the claim indexes twice.
# If the session's last heartbeat is older than half a lease, the session makes an ordinary claim, which counts as a
# heartbeat. An ORDER BY would make PostgreSQL scan the primary key of `needs` as long as a new queue has no statistics.
_CLAIM_NEXT = f"""{_TAKE}
    WHERE id = (SELECT job_id FROM needs WHERE needed_id = :id LIMIT 1)
      AND state = 'waiting' AND paused = 0 AND {HAS_ALL_IT_NEEDS}
      AND EXISTS (SELECT 1 FROM sessions
                  WHERE sessions.id = :session AND sessions.alive_until > :now + :lease_seconds / 2.0)
    {_TAKEN}
"""

_BEAT = """
    UPDATE sessions SET heartbeat_at = :now,
        alive_until = CASE WHEN alive_until > :now + :lease_seconds THEN alive_until ELSE :now + :lease_seconds END
    WHERE id = :session AND ended_at IS NULL
"""

_RAN_OUT = "state = 'leased' AND (lease_expires_at <= :now OR lease_expires_at > :now + :absurd)"


def _reap_statement(sql: Dialect) -> str:
    return f"""
        UPDATE jobs SET
            state = CASE WHEN lost_in_a_row + 1 < :max_lost THEN 'ready' ELSE 'failed' END,
            error = CASE WHEN lost_in_a_row + 1 < :max_lost THEN error ELSE :lost_error END,
            preemptions = preemptions + 1, lost_in_a_row = lost_in_a_row + 1,
            session_id = NULL, lease_expires_at = NULL, affinity = NULL,
            changed_at = :now, changed_by = :by, changed_why = 'lease of session ' || session_id || ' ran out'
        WHERE {_RAN_OUT} AND id IN (SELECT id FROM jobs WHERE {_RAN_OUT} {sql.skip_locked})
    """


LOST_ERROR = (
    f"The lease was lost {MAX_LOST_IN_A_ROW} times in a row, and no work was saved in between. Perhaps the job kills "
    "its sessions, for example by running out of memory. Check the last session's output, then run: mbqueue retry"
)


class Claims(Part):
    @repeatable
    def claim(
        self,
        session: str,
        *,
        now: float,
        lease_seconds: float,
        loaded: tuple[int, int] | None = None,
        reap: bool = True,
    ) -> Lease | None:
        """Claim the next job for this session under a new fence; return None if no job can be claimed now.

        With `reap`, reclaim expired leases first. Jobs of the fold that the session has `loaded` (experiment id, fold)
        come first. All other jobs are ordered by priority, then folds in progress before new folds, then older jobs
        before newer jobs. A claim skips paused jobs and jobs whose next attempt is due later. A claim also skips a fold
        that another live session worked on last, unless that session is busy with a different job. The number of jobs
        in the queue does not affect how long a claim takes. A claim counts as a heartbeat of the session.

        Raises:
            QueueError: if the session does not exist or has ended.
        """
        with self.writing() as db:
            taking_back = self._reap(db, by=session, now=now) if reap else ()
            claim = self._claim(session, now, lease_seconds, loaded)
            steps = [self._beat(session, now, lease_seconds), *taking_back, claim]
            beat, *_, claimed = self.database.together(db, steps)
            if not beat.rowcount:
                raise QueueError(f"Session {session} has ended or was never started. Start a new session: mbqueue work")
            found = claimed.fetchall()
        return lease_of(found, session)

    @repeatable
    def reap_expired(self, *, by: str, now: float) -> int:
        """Reclaim every expired lease, as `claim` does. Return the number of reclaimed leases."""
        with self.writing() as db:
            return sum(rows.rowcount for rows in self.database.together(db, self._reap(db, by=by, now=now)))

    def _beat(self, session: str, now: float, lease_seconds: float) -> Bound:
        """The statement that records a session's heartbeat, unless the session has ended."""
        return _BEAT, _lease_values(session, now, lease_seconds)

    def _claim(self, session: str, now: float, lease_seconds: float, loaded: tuple[int, int] | None) -> Bound:
        experiment_id, fold = loaded or (None, None)
        values = {**_lease_values(session, now, lease_seconds), "absurd": ABSURD_SECONDS}
        return _claim_statement, {**values, "experiment_id": experiment_id, "fold": fold}

    def _claim_next(self, epoch: Job, session: str, now: float, lease_seconds: float) -> Bound:
        return _CLAIM_NEXT, {**_lease_values(session, now, lease_seconds), "id": epoch.id}

    def _reap(self, db: Statements, *, by: str, now: float) -> Sequence[Bound]:
        if not self.database.leases_run_out(db):
            return ()
        limits = {"absurd": ABSURD_SECONDS, "max_lost": MAX_LOST_IN_A_ROW, "lost_error": LOST_ERROR}
        return [(_reap_statement, {"now": now, "by": by, **limits})]


def _lease_values(session: str, now: float, lease_seconds: float) -> dict[str, Any]:
    if not 0 < lease_seconds <= LONGEST_LEASE_SECONDS:
        raise QueueError(f"A lease must last between 0 and {LONGEST_LEASE_SECONDS:.0f} s, not {lease_seconds} s.")
    return {"session": session, "now": now, "lease_seconds": lease_seconds}


def lease_of(found: Sequence[Row], session: str) -> Lease | None:
    """Make the lease from the row that a claim returned; None if the claim returned no row."""
    return Lease(job=Job.from_row(found[0]), session=session) if found else None
