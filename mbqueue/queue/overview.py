"""Describe the whole queue in one dictionary, which `mbqueue status --json` prints and the dashboard shows.

The format is stable: within format 1, keys are only added. Times are Unix timestamps in seconds, and errors are
in the target's unit.

    format          1
    project, now
    experiments[]   name, state, paused, priority, dataset, target {name, unit, kind}, dataset_hash,
                    spec_hash, enqueued_at, results_dir,
                    jobs {state: count}, prepare, record (states), seconds,
                    trial {search, number, of (0: unknown), gpu_hours (0: no limit), settings {key: value}} or null,
                    chosen {search, trial, trials, folds[]} or null
                    preparing (progress of a prepare job that was begun) or null,
                    folds[]  fold, state, epochs_done, epochs_skipped, epochs_total, best_val_mae, best_epoch,
                             last_val_mae, val_mae[], test_mae, test_rocauc (of classes, else null), seconds,
                             epoch_seconds, jobs {state: count},
                             running {job, kind, epoch, session, progress, lease_expires_at} or null
    jobs            {state: count}, over all experiments; for one experiment or search, only over its jobs
    sessions[]      id, state (live, lost, died), host, pid, device, started_at, heartbeat_at, deadline_at,
                    structures_per_second, job {id, experiment, kind, fold, epoch, progress} or null
    errors[]        job, experiment, kind, fold, epoch, state, failures, at, retry_at, error (one line); cancelled jobs
                    are left out; the newest 20 or, for one experiment or search, all

The state of a fold is the first of these that applies: running, done (predictions committed), failed, cancelled,
pruned, paused, ready, waiting. The state of an experiment is the first of these that applies: done (recorded), pruned,
running, paused, ready, failed, cancelled, waiting. `seconds` is the time spent on committed, running and released work,
and `epoch_seconds` is the time spent on committed epochs. Each `progress` has the keys `what`, `done` and `total`, and
if known also `seconds` and `seconds_left`. `sessions` leaves out sessions that ended, or whose last heartbeat is over a
day old. A session is lost if its heartbeat is overdue, and has died if its process on this machine is gone. A dead
session is listed with its job. Experiments, folds and counts already show a dead session's job as ready, because the
next session will release it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.database import Part, Row, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.jobs import Event, Job, Kind, SessionRow, State, error_message
from mbqueue.queue.processes import is_gone
from mbqueue.task import target_of

FORMAT = 1
_DAY_SECONDS = 86_400.0
_ERRORS_SHOWN = 20
_ALL = 2**63 - 1
_STATES = tuple(state.value for state in State)


def _board(sql: Dialect) -> str:
    """The dashboard's query: one row per fold, and one row per experiment for its jobs without a fold.

    SQLite answers the query with a single index scan.
    """
    val_mae = sql.list_of("val_mae", order="epoch", where="kind = 'train' AND state = 'committed'")
    counts = ", ".join(f"count(*) FILTER (WHERE state = '{state}') AS {state}" for state in _STATES)
    return f"""
        SELECT experiment_id, fold,
            {counts},
            count(*) FILTER (WHERE paused = 1 AND state IN ('waiting', 'ready')) AS held,
            count(epoch) AS epochs_total,
            count(epoch) FILTER (WHERE state = 'committed') AS epochs_done,
            count(epoch) FILTER (WHERE state = 'skipped') AS epochs_skipped,
            {val_mae} AS val_mae,
            max(test_mae) AS test_mae, coalesce(sum(seconds), 0.0) AS seconds,
            coalesce(sum(seconds) FILTER (WHERE kind = 'train'), 0.0) AS epoch_seconds,
            max(state) FILTER (WHERE kind = 'prepare') AS prepare,
            max(state) FILTER (WHERE kind = 'record') AS record,
            count(*) FILTER (WHERE kind = 'predict' AND state = 'committed') AS predicted
        FROM jobs{sql.board_index}
        WHERE experiment_id >= :first AND experiment_id <= :last
        GROUP BY experiment_id, fold
        ORDER BY experiment_id, fold NULLS FIRST
    """


#: Finds the jobs that were started and then released. The index leaves out paused jobs, so they need a separate query.
_BEGUN = "SELECT * FROM job_rows WHERE state = 'ready' AND paused = 0 AND progress IS NOT NULL"
_BEGUN_AND_PAUSED = "SELECT * FROM job_rows WHERE state = 'ready' AND paused = 1 AND progress IS NOT NULL"

#: Reads the complete `result`, because the dashboard's index contains only the scores that exist for every experiment.
_PREDICTED = "SELECT fold, result FROM jobs WHERE experiment_id = ? AND kind = 'predict' AND state = 'committed'"


def _experiments(sql: Dialect) -> str:
    return f"SELECT * FROM experiments WHERE :names IS NULL OR {sql.is_among('name', ':names')} ORDER BY id"


def _errors(sql: Dialect) -> str:
    return f"""
        SELECT * FROM job_rows
        WHERE error IS NOT NULL AND state <> 'cancelled'
          AND (:names IS NULL OR {sql.is_among("experiment", ":names")})
        ORDER BY changed_at DESC LIMIT :limit
    """


_EVENTS = """
    SELECT * FROM event_rows
    WHERE (:experiment IS NULL OR experiment = :experiment) AND (:by IS NULL OR by = :by)
      AND at >= :since AND id > :after
    ORDER BY id DESC LIMIT :limit
"""

_OUTLOOK = """
    SELECT
        (SELECT count(*) FROM jobs WHERE state = 'leased') AS leased,
        (SELECT count(*) FROM jobs WHERE state = 'ready' AND paused = 0 AND not_before <= :now) AS ready,
        (SELECT count(*) FROM jobs WHERE state = 'ready' AND paused = 0 AND not_before > :now) AS delayed
"""
_NEXT_RETRY = """
    SELECT job_rows.*, not_before - :now AS seconds_left FROM job_rows
    WHERE state = 'ready' AND paused = 0 AND not_before > :now ORDER BY not_before, id LIMIT 1
"""


class _Group(NamedTuple):
    """One row of `_board`: the jobs of a fold, or an experiment's jobs without a fold."""

    experiment_id: int
    fold: int | None
    waiting: int
    ready: int
    leased: int
    committed: int
    skipped: int
    failed: int
    cancelled: int
    held: int
    epochs_total: int
    epochs_done: int
    epochs_skipped: int
    val_mae: str | None
    test_mae: float | None
    seconds: float
    epoch_seconds: float
    prepare: str | None
    record: str | None
    predicted: int


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The remaining work, for a worker whose claim found no job.

    Attributes:
        ready: the number of ready jobs that are not paused, including jobs reserved for another session.
        delayed: the number of jobs that are waiting for a retry.
        leased: the number of jobs that sessions hold.
        next_retry: the first of the delayed jobs to become due; None if no job is delayed.
        seconds_to_retry: the time until `next_retry` is due.
    """

    ready: int
    delayed: int
    leased: int
    next_retry: Job | None
    seconds_to_retry: float

    @property
    def is_exhausted(self) -> bool:
        """Whether the work needs the user's help to continue: no job is ready, delayed or leased."""
        return self.ready + self.delayed + self.leased == 0


class Reports(Part):
    """Reads jobs, events and the overview."""

    @repeatable
    def job(self, job_id: int) -> Job:
        """Read the job with the given id, which must exist."""
        with self.reading() as db:
            return Job.from_row(db.execute("SELECT * FROM job_rows WHERE id = ?", (job_id,)).fetchone())

    @repeatable
    def jobs(
        self, *, experiment: str | None = None, fold: int | None = None, state: State | None = None
    ) -> tuple[Job, ...]:
        """Read all jobs, or only the jobs of one experiment, fold or state.

        In each experiment, the `prepare` job comes first, then each fold's epochs and `predict` job, then `record`.
        """
        query = (
            "SELECT * FROM job_rows WHERE (:experiment IS NULL OR experiment = :experiment) "
            "AND (:fold IS NULL OR fold = :fold) AND (:state IS NULL OR state = :state) "
            "ORDER BY experiment_id, kind = 'record', kind <> 'prepare', fold, kind = 'predict', epoch"
        )
        with self.reading() as db:
            rows = db.execute(query, {"experiment": experiment, "fold": fold, "state": state and state.value})
            return tuple(Job.from_row(row) for row in rows)

    @repeatable
    def finished_epochs(self) -> dict[tuple[str, int], int]:
        """Map (experiment, fold) to the last committed or skipped epoch, if the fold has one."""
        query = (
            "SELECT experiment, fold, max(epoch) AS epoch FROM job_rows "
            "WHERE kind = 'train' AND state IN ('committed', 'skipped') GROUP BY experiment, fold"
        )
        with self.reading() as db:
            return {(row["experiment"], row["fold"]): row["epoch"] for row in db.execute(query)}

    @repeatable
    def events(
        self,
        *,
        experiment: str | None = None,
        by: str | None = None,
        since: float = 0.0,
        after: int = 0,
        limit: int = 100,
    ) -> tuple[Event, ...]:
        """Read the newest `limit` events that match, oldest first. Only events with an id above `after` match."""
        values = {"experiment": experiment, "by": by, "since": since, "after": after, "limit": limit}
        with self.reading() as db:
            rows = db.execute(_EVENTS, values).fetchall()
        return tuple(Event.from_row(row) for row in reversed(rows))

    @repeatable
    def outlook(self, *, now: float) -> Outlook:
        """Read the remaining work, for a worker whose claim found no job."""
        with self.reading() as db:
            counts = dict(db.execute(_OUTLOOK, {"now": now}).fetchone())
            row = db.execute(_NEXT_RETRY, {"now": now}).fetchone() if counts["delayed"] else None
        if row is None:
            return Outlook(**counts, next_retry=None, seconds_to_retry=0.0)
        return Outlook(**counts, next_retry=Job.from_row(row), seconds_to_retry=row["seconds_left"])

    @repeatable
    def overview(self, *, now: float, project: str = "", experiments: Sequence[str] | None = None) -> dict[str, Any]:
        """Read the state of the whole queue at one instant, in the JSON format that this module's docstring describes.

        If names of `experiments` are given, `experiments`, `jobs` and `errors` cover only these experiments. Names that
        are not in the queue are ignored.
        """
        names = None if experiments is None else json.dumps(list(experiments))
        with self.reading() as db:
            now = self.database.instant(db, now)
            found = db.execute(_experiments, {"names": names}).fetchall()
            ids = [row["id"] for row in found]
            board = db.execute(_board, {"first": min(ids, default=0), "last": max(ids, default=0)})
            groups: dict[int, list[_Group]] = {row["id"]: [] for row in found}
            for row in board:
                if row["experiment_id"] in groups:
                    groups[row["experiment_id"]].append(_Group(**dict(row)))
            rocauc = {
                (row["id"], predicted["fold"]): (_parsed(predicted["result"]) or {}).get("test_rocauc")
                for row in found
                if _target(row["spec"])["kind"] == "class"
                for predicted in db.execute(_PREDICTED, (row["id"],))
            }
            leased = db.execute("SELECT * FROM job_rows WHERE state = 'leased' ORDER BY id").fetchall()
            begun = [*leased, *db.execute(_BEGUN).fetchall()]
            if any(group.held for of_experiment in groups.values() for group in of_experiment):
                begun += db.execute(_BEGUN_AND_PAUSED).fetchall()
            sessions = db.execute(
                "SELECT * FROM sessions WHERE ended_at IS NULL AND heartbeat_at > ? ORDER BY started_at",
                (now - _DAY_SECONDS,),
            ).fetchall()
            limit = _ERRORS_SHOWN if names is None else _ALL
            errors = db.execute(_errors, {"names": names, "limit": limit}).fetchall()
        preparing: dict[int, Any] = {}
        for row in begun:
            progress = _parsed(row["progress"]) or {}
            of_experiment = groups.get(row["experiment_id"], [])
            groups[row["experiment_id"]] = [_with_work(group, row["fold"], progress) for group in of_experiment]
            if row["kind"] == Kind.PREPARE:
                preparing[row["experiment_id"]] = progress or None
        dead = {row["id"] for row in sessions if is_gone(SessionRow.from_row(row).identity, self.database.file)}
        for row in leased:
            if row["session_id"] in dead and row["experiment_id"] in groups:
                groups[row["experiment_id"]] = [_given_back(group, row) for group in groups[row["experiment_id"]]]
        running = {
            (row["experiment_id"], row["fold"]): row
            for row in leased
            if row["fold"] is not None and row["session_id"] not in dead
        }
        shown = [_experiment(row, groups[row["id"]], running, preparing.get(row["id"])) for row in found]
        for row, one in zip(found, shown, strict=True):
            for fold in one["folds"]:
                fold["test_rocauc"] = rocauc.get((row["id"], fold["fold"]))
        return {
            "format": FORMAT,
            "project": project,
            "now": now,
            "experiments": shown,
            "jobs": _added([one["jobs"] for one in shown]),
            "sessions": [_session(row, leased, now, has_died=row["id"] in dead) for row in sessions],
            "errors": [_error(row) for row in errors],
        }


def _experiment(
    row: Row, groups: list[_Group], running: Mapping[tuple[int, int], Row], preparing: Any
) -> dict[str, Any]:
    spec = json.loads(row["spec"])
    counts = _added([_counts(group) for group in groups])
    whole = next(group for group in groups if group.fold is None)
    if whole.record == State.COMMITTED:
        state = "done"
    elif whole.record == State.SKIPPED and not counts["leased"]:
        state = "pruned"
    elif counts["leased"]:
        state = "running"
    elif row["paused"]:
        state = "paused"
    else:
        state = next((name for name in ("ready", "failed", "cancelled") if counts[name]), "waiting")
    return {
        "name": row["name"],
        "state": state,
        "paused": bool(row["paused"]),
        "priority": row["priority"],
        "dataset": row["dataset"],
        "target": _target(row["spec"]),
        "dataset_hash": row["dataset_hash"],
        "spec_hash": row["spec_hash"],
        "enqueued_at": row["enqueued_at"],
        "results_dir": row["results_dir"],
        "jobs": counts,
        "prepare": whole.prepare,
        "record": whole.record,
        "trial": _trial(spec.get("trial")),
        "chosen": spec.get("chosen"),
        "seconds": sum(group.seconds for group in groups),
        "preparing": preparing,
        "folds": [_fold(group, running.get((row["id"], group.fold))) for group in groups if group.fold is not None],
    }


def _trial(trial: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    search = trial["search"]
    return {
        "search": search["name"],
        "number": trial["number"],
        "of": search["trials"],
        "gpu_hours": search.get("gpu_hours", 0.0),
        "settings": trial["settings"],
    }


def _target(spec: str) -> dict[str, str]:
    target = target_of(json.loads(spec))
    return {"name": target.name, "unit": target.unit, "kind": target.kind}


def _fold(group: _Group, running: Row | None) -> dict[str, Any]:
    val_mae: list[float | None] = json.loads(f"[{group.val_mae}]") if group.val_mae else []
    known = [value for value in val_mae if value is not None]
    best = min(known, default=None)
    return {
        "fold": group.fold,
        "state": _fold_state(group),
        "epochs_done": group.epochs_done,
        "epochs_skipped": group.epochs_skipped,
        "epochs_total": group.epochs_total,
        "best_val_mae": best,
        "best_epoch": None if best is None else val_mae.index(best) + 1,
        "last_val_mae": known[-1] if known else None,
        "val_mae": val_mae,
        "test_mae": group.test_mae,
        "test_rocauc": None,
        "seconds": group.seconds,
        "epoch_seconds": group.epoch_seconds,
        "jobs": _counts(group),
        "running": running
        and {
            "job": running["id"],
            "kind": running["kind"],
            "epoch": running["epoch"],
            "session": running["session_id"],
            "progress": _parsed(running["progress"]),
            "lease_expires_at": running["lease_expires_at"],
        },
    }


def _fold_state(group: _Group) -> str:
    if group.leased:
        return "running"
    if group.predicted:
        return "done"
    if group.failed or group.cancelled:
        return "failed" if group.failed else "cancelled"
    if group.skipped > group.epochs_skipped:
        return "pruned"
    if group.held:
        return "paused"
    return "ready" if group.ready else "waiting"


def _with_work(group: _Group, fold: int | None, progress: Mapping[str, Any]) -> _Group:
    return group._replace(seconds=group.seconds + progress.get("seconds", 0.0)) if group.fold == fold else group


def _given_back(group: _Group, job: Row) -> _Group:
    """Return the counts of a group of jobs as they will be once a dead session's job is released."""
    if group.fold != job["fold"]:
        return group
    state = State.READY if job["lost_in_a_row"] + 1 < MAX_LOST_IN_A_ROW else State.FAILED
    changes: dict[str, Any] = {"leased": group.leased - 1, state.value: getattr(group, state.value) + 1}
    changes["held"] = group.held + (state is State.READY and bool(job["paused"]))
    if job["kind"] in {Kind.PREPARE, Kind.RECORD}:
        changes[job["kind"]] = state.value
    return group._replace(**changes)


def _session(row: Row, leased: Iterable[Row], now: float, *, has_died: bool) -> dict[str, Any]:
    job = next((job for job in leased if job["session_id"] == row["id"]), None)
    return {
        "id": row["id"],
        "state": "died" if has_died else "live" if row["alive_until"] > now else "lost",
        "host": row["host"],
        "pid": row["pid"],
        "device": row["device"],
        "started_at": row["started_at"],
        "heartbeat_at": row["heartbeat_at"],
        "deadline_at": row["deadline_at"],
        "structures_per_second": row["structures_per_second"],
        "job": job
        and {
            **{key: job[key] for key in ("id", "experiment", "kind", "fold", "epoch")},
            "progress": _parsed(job["progress"]),
        },
    }


def _error(row: Row) -> dict[str, Any]:
    return {
        "job": row["id"],
        **{key: row[key] for key in ("experiment", "kind", "fold", "epoch", "state", "failures")},
        "at": row["changed_at"],
        "retry_at": row["not_before"] or None,
        "error": error_message(row["error"]),
    }


def _counts(group: _Group) -> dict[str, int]:
    return {name: getattr(group, name) for name in _STATES}


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in _STATES}


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
