"""Record sessions: when and where they run, and whether they are alive."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mbqueue.clock import utc_text
from mbqueue.errors import QueueError
from mbqueue.queue.claiming import LOST_ERROR, MAX_LOST_IN_A_ROW
from mbqueue.queue.database import Database, Part, Statements, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.jobs import SessionRow
from mbqueue.queue.notes import note
from mbqueue.queue.processes import ProcessIdentity, boot_id, is_gone, is_known_living, this_process

_START = """
    INSERT INTO sessions (id, host, boot_id, pid, pid_started, device,
                          started_at, heartbeat_at, alive_until, deadline_at)
    VALUES (:id, :host, :boot_id, :pid, :pid_started, :device, :now, :now, :now + :alive_seconds, :deadline_at)
"""

_HEARTBEAT = """
    UPDATE sessions SET heartbeat_at = :now, alive_until = :now + :alive_seconds,
        structures_per_second = coalesce(:structures_per_second, structures_per_second)
    WHERE id = :id AND ended_at IS NULL
"""

_END = "UPDATE sessions SET ended_at = :now, end_reason = :reason WHERE id = :id AND ended_at IS NULL"

_GIVE_BACK = """
    UPDATE jobs SET
        state = CASE WHEN lost_in_a_row + :lost < :max_lost THEN 'ready' ELSE 'failed' END,
        error = CASE WHEN lost_in_a_row + :lost < :max_lost THEN error ELSE :lost_error END,
        session_id = NULL, lease_expires_at = NULL,
        preemptions = preemptions + 1, lost_in_a_row = lost_in_a_row + :lost,
        changed_at = :now, changed_by = :by, changed_why = :why
    WHERE state = 'leased' AND session_id = :id
"""


def _held(sql: Dialect) -> str:
    return f"SELECT id FROM jobs WHERE state = 'leased' AND session_id = ? {sql.lock}"


class Sessions(Part):
    @repeatable
    def start_session(
        self,
        *,
        device: str,
        now: float,
        alive_seconds: float,
        deadline_at: float | None = None,
        identity: ProcessIdentity | None = None,
    ) -> str:
        """Record a new session, by default for this process. Return the session's id, which is unique across machines.

        A session counts as live for `alive_seconds` after its last heartbeat.
        """
        identity = identity or this_process()
        with self.writing() as db:
            ahead = self.database.instant(db, now) - now
            session = f"{utc_text(now + ahead).replace('-', '').replace(':', '')}-{secrets.token_hex(3)}"
            db.execute(
                _START,
                {
                    "id": session,
                    "host": identity.host,
                    "boot_id": identity.boot_id,
                    "pid": identity.pid,
                    "pid_started": identity.pid_started,
                    "device": device,
                    "now": now,
                    "alive_seconds": alive_seconds,
                    "deadline_at": None if deadline_at is None else deadline_at + ahead,
                },
            )
            note(db, f"session started on {identity.host}, {device}", by=session, now=now)
        return session

    @repeatable
    def heartbeat(
        self,
        session: str,
        *,
        now: float,
        alive_seconds: float,
        structures_per_second: float | None = None,
    ) -> None:
        """Record that the session is alive, and optionally its speed.

        Raises:
            QueueError: if the session has ended, for example because another session considered it dead.
        """
        values = {
            "id": session,
            "now": now,
            "alive_seconds": alive_seconds,
            "structures_per_second": structures_per_second,
        }
        with self.writing() as db:
            if not db.execute(_HEARTBEAT, values).rowcount:
                raise QueueError(f"Session {session} has ended or was never started. Start a new session: mbqueue work")

    @repeatable
    def end_session(self, session: str, *, reason: str, now: float, lost: bool = False) -> None:
        """End the session, and release its jobs as preempted; do nothing if it has already ended.

        With ``lost``, the session counts as dead and its jobs as lost. A job that is lost too many times in a row
        becomes `failed`.
        """
        with self.writing() as db:
            _end(db, session, reason=reason, by=session, now=now, lost=lost)

    @repeatable
    def reap_dead(self, *, by: str, now: float) -> tuple[SessionRow, ...]:
        """End the sessions on this machine whose processes are known to be dead, and release their jobs.

        Also end sessions whose processes are using a different queue file, of which this queue is a copy.

        Sessions on other machines, in other containers or from earlier boots are left alone, because their leases will
        expire.
        """
        with self.reading() as db:
            rows = db.execute(
                "SELECT * FROM sessions WHERE ended_at IS NULL AND boot_id = ? AND id <> ? ORDER BY id", (boot_id(), by)
            )
            live = [SessionRow.from_row(row) for row in rows]
        dead = [row for row in live if is_gone(row.identity, self.database.file)]
        if dead:
            with self.writing() as db:
                for row in dead:
                    is_elsewhere = is_known_living(row.identity)
                    why = "uses the queue from which this one was copied" if is_elsewhere else "is gone"
                    _end(db, row.id, reason=f"process {row.pid} {why}", by=by, now=now, lost=not is_elsewhere)
        return tuple(dead)

    @repeatable
    def session(self, session: str) -> SessionRow:
        """One session.

        Raises:
            QueueError: if no session has this id.
        """
        with self.reading() as db:
            row = db.execute("SELECT * FROM sessions WHERE id = ?", (session,)).fetchone()
        if row is None:
            raise QueueError(f"There is no session {session}.")
        return SessionRow.from_row(row)

    @repeatable
    def sessions(self, *, experiment: str | None = None) -> tuple[SessionRow, ...]:
        """All sessions, or only the sessions that worked on an experiment, oldest first."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT * FROM sessions WHERE :experiment IS NULL OR id IN "
                "(SELECT by FROM event_rows WHERE experiment = :experiment AND to_state = 'leased') "
                "ORDER BY started_at, id",
                {"experiment": experiment},
            ).fetchall()
        return tuple(SessionRow.from_row(row) for row in rows)

    @repeatable
    def note(
        self, why: str, *, by: str, now: float, experiment_id: int | None = None, job_id: int | None = None
    ) -> None:
        """Add a note to the events, for example about a damaged checkpoint or a lost mount."""
        with self.writing() as db:
            note(db, why, by=by, now=now, experiment_id=experiment_id, job_id=job_id)


def at_work(database: Database, db: Statements, *, now: float) -> SessionRow | None:
    """Find a session that may still write to a queue and therefore blocks moving or replacing the queue.

    Args:
        now: the time by the database's clock, as a Unix timestamp.
    """
    rows = db.execute("SELECT * FROM sessions WHERE ended_at IS NULL ORDER BY id").fetchall()
    return next((row for row in map(SessionRow.from_row, rows) if may_be_at_work(row, now, database.file)), None)


def may_be_at_work(row: SessionRow, now: float, queue_file: Path | None) -> bool:
    """Whether a session may still write: its heartbeat is recent, or its process is alive.

    Args:
        queue_file: as for `mbqueue.queue.processes.is_gone`.
    """
    if row.ended_at is not None or is_gone(row.identity, queue_file):
        return False  # A session that was killed a moment ago has a recent heartbeat but a dead process.
    # This process's earlier sessions have ended, even if the queue could not record how they ended.
    return row.is_live(now) or (is_known_living(row.identity) and row.pid != os.getpid())


def _end(db: Statements, session: str, *, reason: str, by: str, now: float, lost: bool) -> None:
    if db.execute(_END, {"id": session, "now": now, "reason": reason}).rowcount:
        why = f"session {session} ended: {reason}"
        limit = {"max_lost": MAX_LOST_IN_A_ROW, "lost_error": LOST_ERROR}
        db.execute(_held, (session,))  # wait for a commit in progress, because it may also claim the next job
        db.execute(_GIVE_BACK, {"id": session, "now": now, "by": by, "why": why, "lost": int(lost), **limit})
        note(db, why, by=by, now=now)
