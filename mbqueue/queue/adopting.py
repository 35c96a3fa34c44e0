"""Adopt work that other machines have done: published commits, predictions and sessions.

Only this module commits a job without a lease. The session that did the work held a lease in its own database, and the
caller has already verified the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mbqueue.errors import QueueError, counted
from mbqueue.history import best_epoch
from mbqueue.queue.claiming import LONGEST_LEASE_SECONDS
from mbqueue.queue.database import Part, Row, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.edges import HAS_ALL_IT_NEEDS, REWIND, SKIP_LATER_EPOCHS, settle
from mbqueue.queue.enqueueing import find_experiment
from mbqueue.queue.jobs import Kind, SeenSession, history_row
from mbqueue.queue.leases import LEASE_GIVEN_UP, result_columns
from mbqueue.queue.notes import note

_JOBS_OF_FOLD = """
    SELECT * FROM jobs WHERE experiment_id = :experiment_id AND kind = 'train' AND fold = :fold ORDER BY epoch
"""

_WAIT = """
    UPDATE jobs SET state = 'waiting', failures = 0, lost_in_a_row = 0, not_before = 0,
        changed_at = :now, changed_by = :by, changed_why = :why
    WHERE id = :id AND state IN ('failed', 'ready')
"""

# The next claim of this epoch must have a higher fence than the commit that is being adopted.
_RAISE_FENCE = """
    UPDATE jobs SET fence = CASE WHEN fence < :fence THEN :fence ELSE fence END, started = 1 WHERE id = :id
"""

_SEE_SESSION = """
    INSERT INTO sessions (id, host, boot_id, pid, pid_started, device,
                          started_at, heartbeat_at, alive_until, deadline_at)
    VALUES (:id, :host, :boot_id, :pid, :pid_started, :device,
            :started_at, :heartbeat_at, :alive_until, :deadline_at)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, alive_until = excluded.alive_until,
        deadline_at = excluded.deadline_at, ended_at = NULL, end_reason = NULL
"""

_LEAVE_FOLD = """
    UPDATE jobs SET affinity = :session
    WHERE experiment_id = :experiment_id AND fold = :fold AND state IN ('waiting', 'ready')
      AND coalesce(affinity, '') <> :session
"""


def _adopt(sql: Dialect) -> str:
    return f"""
        UPDATE jobs SET state = 'committed', {result_columns(sql)}, progress = NULL, started = 1,
            fence = CASE WHEN fence < :fence THEN :fence ELSE fence END,
            error = NULL, lost_in_a_row = 0, not_before = 0,
            changed_at = :now, changed_by = :by, changed_why = :why
        WHERE id = :id AND state IN ('waiting', 'ready')
    """


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The progress of a fold in a verified chain of commits.

    Attributes:
        history: one row per finished epoch; `epoch` counts from 1 without gaps.
        source: the name of the newest commit, for the events.
        fence: the newest commit's fence.
        is_within: whether the newest commit is a mid-epoch checkpoint, whose epoch has no row in `history`.
        skip_rest: whether early stopping has ended the fold, so that its remaining epochs will not be trained.
    """

    experiment: str
    fold: int
    history: Sequence[Mapping[str, Any]]
    source: str
    fence: int = 0
    is_within: bool = False
    skip_rest: bool = False


class Adopting(Part):
    @repeatable
    def adopt(
        self, trained: Trained, *, now: float, by: str = "adopt", publish: Callable[[], None] | None = None
    ) -> bool:
        """Make the fold's jobs match a chain of commits exactly.

        Every finished epoch of the chain becomes committed with its history row, even if its job had failed. Committed
        epochs that are missing from the chain, or differ from it, are rewound first, together with the fold's `predict`
        job and the `record` job. If a user cancelled an epoch's job, the jobs of that epoch and of all later epochs do
        not change. If a session holds a lease on the fold, nothing changes.

        Args:
            publish: moves the chain's files into place, while no session can claim the fold. If `publish` raises,
                nothing is written.

        Returns:
            True if the jobs now match the chain of commits; False if a session holds a lease on the fold.

        Raises:
            UsageError: if there is no such experiment.
        """
        with self.writing() as db:
            experiment_id = find_experiment(db, trained.experiment, to_change=True).id
            scope = {"experiment_id": experiment_id, "fold": trained.fold, "now": now, "by": by}
            jobs = db.execute(_JOBS_OF_FOLD, scope).fetchall()
            if any(job["state"] == "leased" for job in jobs):
                return False
            if publish is not None:
                publish()
            why = f"adopted from {trained.source}"
            agreed = _agreed_epochs(jobs, trained.history)
            changed = 0
            if any(job["state"] == "committed" and job["epoch"] > agreed for job in jobs):
                put_back = f"rewound to the published chain that ends with {trained.source}"
                changed += db.execute(REWIND, {**scope, "to_epoch": agreed, "why": put_back}).rowcount
            for job in db.execute(_JOBS_OF_FOLD, scope).fetchall():
                if job["epoch"] <= agreed:
                    continue
                if job["epoch"] > len(trained.history):
                    if trained.is_within and job["epoch"] == len(trained.history) + 1:
                        db.execute(_RAISE_FENCE, {"id": job["id"], "fence": trained.fence})
                    break
                if job["state"] == "cancelled":
                    break
                if job["state"] == "failed":
                    db.execute(_WAIT, {**scope, "id": job["id"], "why": why})
                row = trained.history[job["epoch"] - 1]
                best = best_epoch(trained.history[: job["epoch"]])
                assert best is not None
                last = job["epoch"] == len(trained.history) and not trained.is_within
                result = json.dumps({**row, "best_epoch": best[0]}, allow_nan=False, ensure_ascii=False)
                values = {"id": job["id"], "result": result, "fence": trained.fence if last else 0, "why": why}
                changed += db.execute(_adopt, {**scope, **values}).rowcount
            if trained.skip_rest:
                skip = {**scope, "epoch": len(trained.history), "why": f"early stopping, from {trained.source}"}
                db.execute(_BACK_TO_WAITING, skip)
                changed += db.execute(SKIP_LATER_EPOCHS, skip).rowcount
            if changed:
                fold = f"fold {trained.fold}: {counted(len(trained.history), 'epoch')} {why}"
                note(db, fold, by=by, now=now, experiment_id=experiment_id)
            settle(db, experiment_id, by=by, now=now)
            return True

    @repeatable
    def adopt_result(
        self,
        experiment: str,
        kind: Kind,
        *,
        result: Mapping[str, Any],
        source: str,
        now: float,
        fold: int | None = None,
        by: str = "adopt",
    ) -> bool:
        """Adopt another machine's result for a `prepare`, `predict` or `record` job whose dependencies are all done.

        The result of a `prepare` job must contain `dataset_hash`.

        Returns:
            True if the job was waiting, ready or failed, and is now committed.

        Raises:
            QueueError: if the crystals that a `prepare` job found differ from the experiment's.
        """
        with self.writing() as db:
            found = find_experiment(db, experiment, to_change=True)
            scope = {"experiment_id": found.id, "now": now, "by": by, "why": f"adopted from {source}"}
            job = db.execute(
                "SELECT id, state FROM jobs WHERE experiment_id = :experiment_id AND kind = :kind "
                "AND coalesce(fold, -1) = :fold AND epoch IS NULL",
                {**scope, "kind": kind.value, "fold": -1 if fold is None else fold},
            ).fetchone()
            if job is None or job["state"] not in {"waiting", "ready", "failed"}:
                return False
            ready = f"SELECT 1 FROM jobs WHERE id = ? AND {HAS_ALL_IT_NEEDS}"
            if db.execute(ready, (job["id"],)).fetchone() is None:
                return False
            if kind is Kind.PREPARE:
                if found.dataset_hash not in (None, result["dataset_hash"]):
                    raise QueueError(
                        f"{source} was made from different crystals than {experiment} in {self.database.name}."
                    )
                db.execute("UPDATE experiments SET dataset_hash = ? WHERE id = ?", (result["dataset_hash"], found.id))
            if job["state"] == "failed":
                db.execute(_WAIT, {**scope, "id": job["id"]})
            text = json.dumps(dict(result), allow_nan=False, ensure_ascii=False)
            changed = db.execute(_adopt, {**scope, "id": job["id"], "result": text, "fence": 0}).rowcount
            settle(db, found.id, by=by, now=now)
            return bool(changed)

    @repeatable
    def see_session(self, seen: SeenSession, *, folds: Iterable[tuple[str, int]], now: float) -> None:
        """Record a session on another machine as live, and reserve the session's folds.

        `folds` contains (experiment, fold) pairs. Pairs whose experiment is not in the queue are ignored.
        """
        # A session whose clock is ahead must not reserve folds forever.
        alive_until = min(seen.alive_until, now + LONGEST_LEASE_SECONDS)
        with self.writing() as db:
            db.execute(_SEE_SESSION, {**asdict(seen), "alive_until": alive_until})
            for experiment, fold in folds:
                row = db.execute("SELECT id FROM experiments WHERE name = ?", (experiment,)).fetchone()
                if row is not None:
                    db.execute(_LEAVE_FOLD, {"session": seen.id, "experiment_id": row["id"], "fold": fold})

    @repeatable
    def end_all_sessions(self, *, reason: str, now: float, by: str) -> int:
        """End every session and release its jobs, because this database is a copy that no session is using.

        The jobs do not count as preempted, because the sessions may still be running with the original database.

        Returns:
            The number of ended sessions.
        """
        with self.writing() as db:
            values = {"now": now, "by": by, "why": f"lease released: {reason}", "reason": reason}
            db.execute(LEASE_GIVEN_UP, values)
            return db.execute(
                "UPDATE sessions SET ended_at = :now, end_reason = :reason WHERE ended_at IS NULL", values
            ).rowcount


_BACK_TO_WAITING = """
    UPDATE jobs SET state = 'waiting', changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND fold = :fold AND kind = 'train' AND epoch > :epoch AND state = 'ready'
"""


def _agreed_epochs(jobs: Iterable[Row], history: Sequence[Mapping[str, Any]]) -> int:
    agreed = 0
    for job, row in zip(jobs, history, strict=False):
        if job["state"] != "committed":
            break
        if history_row(json.loads(job["result"])) != row:
            break
        agreed += 1
    return agreed
