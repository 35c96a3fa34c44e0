"""Add experiments to the queue, and refuse a second spec with the same name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Any

from mbqueue.errors import ExperimentExists, QueueError, UsageError
from mbqueue.queue.database import Part, Statements, repeatable
from mbqueue.queue.dialect import Dialect
from mbqueue.queue.edges import link, settle
from mbqueue.queue.jobs import Experiment, Kind

if TYPE_CHECKING:
    from mbqueue.experiment import Spec

_INSERT_EXPERIMENT = """
    INSERT INTO experiments (name, spec, spec_hash, results_dir, dataset, priority, enqueued_at)
    VALUES (:name, :spec, :spec_hash, :results_dir, :dataset, :priority, :now)
    RETURNING id
"""

_INSERT_JOB = """
    INSERT INTO jobs (experiment_id, kind, fold, epoch, state, priority, paused, enqueued_at,
                      changed_at, changed_by, changed_why)
    VALUES (:experiment_id, :kind, :fold, :epoch, 'waiting', :priority, :paused, :now, :now, :by, 'enqueued')
"""

_REOPEN_RECORD = """
    UPDATE jobs SET state = 'waiting', session_id = NULL, lease_expires_at = NULL, result = NULL,
        val_mae = NULL, test_mae = NULL, seconds = NULL, failures = 0,
        not_before = 0, changed_at = :now, changed_by = :by, changed_why = :why
    WHERE experiment_id = :experiment_id AND kind = 'record' AND state <> 'waiting'
"""

_EXPERIMENT = "SELECT * FROM experiments WHERE name = ?"

#: Priorities are between -MOST_URGENT and MOST_URGENT, so every database can store them in 32 bits.
MOST_URGENT = 2**31 - 1

# Keys that may differ between two specs of one experiment, because they do not change a fold's result.
_FREE_KEYS = {"name", "results_name", "description", "folds"}
# Keys that the error message lists last, because their values contain whole specs.
_LONG_KEYS = {"trial", "made_from"}
# The limits of the error message: the number of keys, and the number of characters of each value.
_MOST_SHOWN, _LONGEST_SHOWN = 20, 80


class Outcome(StrEnum):
    CREATED = "created"
    UNCHANGED = "unchanged"
    FOLDS_ADDED = "folds added"


@dataclass(frozen=True, kw_only=True)
class EnqueueOutcome:
    """The outcome of `enqueue`, with the experiment's current row.

    Attributes:
        folds: the folds that were added.
        n_jobs: the number of jobs that were added.
    """

    outcome: Outcome
    experiment: Experiment
    folds: tuple[int, ...]
    n_jobs: int


class Enqueueing(Part):
    @repeatable
    def enqueue(
        self, spec: Spec, *, results_dir: str, now: float, priority: int = 0, by: str = "enqueue"
    ) -> EnqueueOutcome:
        """Add an experiment to the queue, or add its missing folds.

        Enqueueing the same spec and folds again changes nothing, not even `results_dir` or `priority`. When folds are
        added, the `record` job returns to the state `waiting`, so that its results will cover all folds.

        Raises:
            ExperimentExists: if the queue already has an experiment with this name and a different spec. The message
                lists the keys that differ.
            UsageError: if another experiment already writes to `results_dir`, or the priority is out of bounds.
        """
        require_priority(priority)
        with self.writing() as db:
            self.database.together(db, self.database.holding(None))
            row = db.execute(_experiment_to_change, (spec.name,)).fetchone()
            if row is None:
                return self._create(db, spec, results_dir=results_dir, priority=priority, by=by, now=now)
            experiment = Experiment.from_row(row)
            if not experiment.is_of(spec):
                taken = {row["name"] for row in db.execute("SELECT name FROM experiments")}
                from mbqueue.experiment import parse_spec  # noqa: PLC0415 - reading commands need not wait for pydantic

                # Parsing adds the keys that did not exist when the spec was written, with the values that mbqueue used
                # then.
                there = parse_spec(experiment.spec, source=f"the spec of {spec.name} in the queue")
                raise ExperimentExists(_difference(spec.name, there.to_json(), spec.to_json(), taken))
            missing = tuple(fold for fold in spec.folds if fold not in experiment.spec["folds"])
            if not missing:
                return EnqueueOutcome(outcome=Outcome.UNCHANGED, experiment=experiment, folds=(), n_jobs=0)
            return self._add_folds(db, experiment, missing, epochs=spec.train.epochs, by=by, now=now)

    @repeatable
    def experiment(self, name: str) -> Experiment:
        """Read an experiment by its name.

        Raises:
            UsageError: if there is no such experiment; the message lists the existing experiments.
        """
        with self.reading() as db:
            return find_experiment(db, name)

    @repeatable
    def experiment_of(self, experiment_id: int) -> Experiment:
        """Read an experiment by its id (`job.experiment_id`).

        Raises:
            QueueError: if no experiment has this id.
        """
        with self.reading() as db:
            row = db.execute("SELECT * FROM experiments WHERE id = ?", (experiment_id,)).fetchone()
        if row is None:
            raise QueueError(f"There is no experiment with id {experiment_id} in {self.database.name}.")
        return Experiment.from_row(row)

    @repeatable
    def experiments(self) -> tuple[Experiment, ...]:
        """All experiments, oldest first."""
        with self.reading() as db:
            return tuple(Experiment.from_row(row) for row in db.execute("SELECT * FROM experiments ORDER BY id"))

    @repeatable
    def is_empty(self) -> bool:
        """Whether no experiment has ever been enqueued."""
        with self.reading() as db:
            return db.execute("SELECT id FROM experiments LIMIT 1").fetchone() is None

    @repeatable
    def trials(self) -> tuple[Experiment, ...]:
        """The experiments that are trials of a search, oldest first."""
        query = """SELECT * FROM experiments WHERE spec LIKE '%"trial": {%' ORDER BY id"""
        with self.reading() as db:
            return tuple(Experiment.from_row(row) for row in db.execute(query))

    def _create(
        self, db: Statements, spec: Spec, *, results_dir: str, priority: int, by: str, now: float
    ) -> EnqueueOutcome:
        other = db.execute("SELECT name FROM experiments WHERE results_dir = ?", (results_dir,)).fetchone()
        if other is not None:
            raise UsageError(
                f"{other['name']} already writes its results to {results_dir}. Give {spec.name} a different "
                "results_name."
            )
        values = {"name": spec.name, "spec": json.dumps(spec.to_json()), "spec_hash": spec.hash, "priority": priority}
        values |= {"results_dir": results_dir, "dataset": spec.data.dataset, "now": now}
        experiment_id = db.execute(_INSERT_EXPERIMENT, values).fetchall()[0]["id"]
        jobs: list[tuple[Kind, int | None, int | None]] = [(Kind.PREPARE, None, None)]
        jobs += [job for fold in spec.folds for job in _jobs_of_fold(fold, spec.train.epochs)]
        jobs += [(Kind.RECORD, None, None)]
        _insert_jobs(db, experiment_id, jobs, priority=priority, paused=False, by=by, now=now)
        link(db, self.database.dialect, experiment_id, epochs=spec.train.epochs)
        settle(db, experiment_id, by=by, now=now)
        return EnqueueOutcome(
            outcome=Outcome.CREATED, experiment=_read(db, experiment_id), folds=spec.folds, n_jobs=len(jobs)
        )

    def _add_folds(
        self,
        db: Statements,
        experiment: Experiment,
        folds: tuple[int, ...],
        *,
        epochs: int,
        by: str,
        now: float,
    ) -> EnqueueOutcome:
        spec = {**experiment.spec, "folds": sorted({*experiment.spec["folds"], *folds})}
        db.execute("UPDATE experiments SET spec = ? WHERE id = ?", (json.dumps(spec), experiment.id))
        jobs = [job for fold in folds for job in _jobs_of_fold(fold, epochs)]
        _insert_jobs(db, experiment.id, jobs, priority=experiment.priority, paused=experiment.paused, by=by, now=now)
        why = f"folds added: {', '.join(str(fold) for fold in folds)}"
        db.execute(_REOPEN_RECORD, {"experiment_id": experiment.id, "by": by, "now": now, "why": why})
        link(db, self.database.dialect, experiment.id, epochs=epochs)
        settle(db, experiment.id, by=by, now=now)
        return EnqueueOutcome(
            outcome=Outcome.FOLDS_ADDED, experiment=_read(db, experiment.id), folds=folds, n_jobs=len(jobs)
        )


def find_experiment(db: Statements, name: str, *, to_change: bool = False) -> Experiment:
    """Read an experiment by its name. With ``to_change``, lock the experiment as `Database.holding` does.

    Raises:
        UsageError: if there is no such experiment; the message lists the existing experiments.
    """
    row = db.execute(_experiment_to_change if to_change else _EXPERIMENT, (name,)).fetchone()
    if row is None:
        known = [known["name"] for known in db.execute("SELECT name FROM experiments ORDER BY name LIMIT 50")]
        raise UsageError(
            f"There is no experiment {name} in the queue. "
            + (
                f"The queue has: {', '.join(known)}."
                if known
                else "The queue is empty. Start with: mbqueue enqueue NAME"
            )
        )
    return Experiment.from_row(row)


def _experiment_to_change(sql: Dialect) -> str:
    return f"{_EXPERIMENT} {sql.lock}"


def require_priority(priority: int) -> None:
    """Reject a priority that a database cannot store.

    Raises:
        UsageError: if the priority is out of bounds.
    """
    if abs(priority) > MOST_URGENT:
        raise UsageError(
            f"A priority of {priority} is out of range. Use a number between -{MOST_URGENT} and {MOST_URGENT}."
        )


def _jobs_of_fold(fold: int, epochs: int) -> Iterator[tuple[Kind, int | None, int | None]]:
    for epoch in range(1, epochs + 1):
        yield Kind.TRAIN, fold, epoch
    yield Kind.PREDICT, fold, None


def _insert_jobs(
    db: Statements,
    experiment_id: int,
    jobs: list[tuple[Kind, int | None, int | None]],
    *,
    priority: int,
    paused: bool,
    by: str,
    now: float,
) -> None:
    shared = {"experiment_id": experiment_id, "priority": priority, "paused": int(paused), "now": now, "by": by}
    db.executemany(
        _INSERT_JOB, ({**shared, "kind": kind.value, "fold": fold, "epoch": epoch} for kind, fold, epoch in jobs)
    )


def _read(db: Statements, experiment_id: int) -> Experiment:
    return Experiment.from_row(db.execute("SELECT * FROM experiments WHERE id = ?", (experiment_id,)).fetchone())


def different_keys(there: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys that differ between two specs and affect a fold's result.

    Keys whose values may be whole specs come last.
    """
    old_values, new_values = dict(_flat(there)), dict(_flat(new))
    return [
        key
        for key in sorted({*old_values, *new_values}, key=lambda key: (key.split(".")[0] in _LONG_KEYS, key))
        if key not in _FREE_KEYS and old_values.get(key) != new_values.get(key)
    ]


def _difference(name: str, there: Mapping[str, Any], new: Mapping[str, Any], taken: set[str]) -> str:
    old_values, new_values, different = dict(_flat(there)), dict(_flat(new)), different_keys(there, new)
    lines = [
        f"  {key}: {_short(old_values.get(key))} in the queue, {_short(new_values.get(key))} now"
        for key in different[:_MOST_SHOWN]
    ]
    if len(different) > _MOST_SHOWN:
        lines.append(f"  and {len(different) - _MOST_SHOWN} more")
    free = next(other for other in (f"{name[:60]}-{number}" for number in count(2)) if other not in taken)
    return (
        f"{name} is already in the queue with a different spec:\n"
        + "\n".join(lines)
        + f"\nNothing was changed. Cancelling an experiment does not free its name. "
        f"Enqueue the new one with --name {free}"
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
