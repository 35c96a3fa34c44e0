"""The immutable rows that the queue returns, and the kinds and states of jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from mbqueue.queue.database import Row
from mbqueue.queue.processes import ProcessIdentity

if TYPE_CHECKING:
    from mbqueue.experiment import Spec
    from mbqueue.storage.manifest import Identity

#: The note that a worker adds to a job once the data and the model are on the device and work begins.
LOADED_NOTE = "data and model are loaded"

#: The note that a session on a drive adds to the events each time it has published to the mount during training.
_PUBLISHED_NOTE = "published to the mount in {:.1f} s"
_PUBLISHED = re.compile(r"published to the mount in (\d+\.\d) s")


def published_note(seconds: float) -> str:
    return _PUBLISHED_NOTE.format(seconds)


def published_seconds(note: str) -> float | None:
    """The duration in seconds from a note that `published_note` made; None for any other note."""
    match = _PUBLISHED.fullmatch(note)
    return None if match is None else float(match[1])


def error_message(traceback: str) -> str:
    """The last exception of a traceback on one line, with its class and full message; empty for an empty traceback."""
    lines = traceback.strip().splitlines()
    inner = [i for i, line in enumerate(lines) if line.startswith(('  File "', "Traceback"))]
    start = next((i for i in range(inner[-1] + 1, len(lines)) if lines[i][:1].strip()), 0) if inner else 0
    said = [" ".join(line.split()) for line in lines[start:] if line.strip()]
    return re.sub(r"(?<![.:;,])\n", "; ", "\n".join(said)).replace("\n", " ")


#: The keys of a `train` job's result that are not in the epoch's history row.
_BESIDE_THE_ROW = {"best_epoch", "checkpoint_seconds"}


def history_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Extract the history row from the result of a `train` job.

    The manifest of the epoch's commit contains the same history row.
    """
    return {key: value for key, value in result.items() if key not in _BESIDE_THE_ROW}


class Kind(StrEnum):
    """The kind of a job. Every experiment has one `prepare` job and one `record` job."""

    PREPARE = "prepare"
    TRAIN = "train"
    PREDICT = "predict"
    RECORD = "record"


class State(StrEnum):
    """The state of a job. `mbqueue.queue.transitions` lists the allowed changes."""

    WAITING = "waiting"
    READY = "ready"
    LEASED = "leased"
    COMMITTED = "committed"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: For each column that is text or a number in the database but has another type in Python, the function that converts
#: it.
_CONVERTED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("spec", "progress", "result"), json.loads),
    **dict.fromkeys(("state", "from_state", "to_state"), State),
    **dict.fromkeys(("paused", "started"), bool),
    "kind": Kind,
}


def _fields(kind: type[Any], row: Row) -> dict[str, Any]:
    """The fields of a dataclass, read from the columns with the same names (`session` from `session_id`)."""
    found = {}
    for name in kind.__dataclass_fields__:
        value = row["session_id" if name == "session" else name]
        found[name] = _CONVERTED[name](value) if name in _CONVERTED and value is not None else value
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, as it was when its row was read.

    Attributes:
        fold: 0–4, or None for `prepare` and `record`.
        epoch: 1-based, for `train` only.
        priority: jobs with a higher priority are claimed first.
        started: whether a session has worked on this job, or on an earlier job of its fold.
        fence: the number of times that the job has been claimed; a write with an older fence changes nothing.
        session: the session that holds the lease, or None.
        affinity: the session that last worked on this fold; other sessions do not claim the job while that session is
            live and idle.
        failures: the number of attempts that ended with an error.
        preemptions: the number of attempts that were preempted.
        lost_in_a_row: how many times the lease expired or its holder died since work was last saved.
        not_before: earliest time of the next attempt, as a Unix timestamp; 0 if the job need not wait.
        progress: the progress of an unfinished job that a worker last saved; None once the job is finished.
        error: traceback of the last failure.
    """

    id: int
    experiment_id: int
    experiment: str
    kind: Kind
    fold: int | None
    epoch: int | None
    state: State
    priority: int
    paused: bool
    started: bool
    fence: int
    session: str | None
    lease_expires_at: float | None
    affinity: str | None
    failures: int
    preemptions: int
    lost_in_a_row: int
    not_before: float
    enqueued_at: float
    changed_at: float
    changed_by: str
    changed_why: str
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: str | None

    @property
    def label(self) -> str:
        """The job's name in messages, such as ``full_finetune fold 2 epoch 7``."""
        fold = "" if self.fold is None else f" fold {self.fold}"
        what = f" epoch {self.epoch}" if self.kind is Kind.TRAIN else f" {self.kind}"
        return f"{self.experiment}{fold}{what}"

    @classmethod
    def from_row(cls, row: Row) -> Job:
        return cls(**_fields(cls, row))


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A session's right to work on a job. The lease is valid as long as the job's fence is unchanged.

    `job` is the job's row as of the claim or the last renewal. `job.progress` is the progress that an earlier holder of
    the job saved. `job.paused` means that a user has paused the job.
    """

    job: Job
    session: str

    @property
    def fence(self) -> int:
        return self.job.fence


def told_apart_by(spec: Mapping[str, Any], spec_hash: str) -> tuple[str, bool]:
    """What distinguishes experiments with the same name: the spec's hash, and whether the spec is a trial's."""
    return spec_hash, "trial" in spec  # the spec hash ignores `trial`


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment in the queue.

    Attributes:
        spec: the whole spec as plain JSON values; its `folds` are all folds enqueued so far.
        results_dir: as given to `enqueue`.
        dataset_hash: hash of the crystals; None until `prepare` is committed, and constant from then on.
    """

    id: int
    name: str
    spec: dict[str, Any]
    spec_hash: str
    results_dir: str
    dataset: str
    dataset_hash: str | None
    priority: int
    paused: bool
    enqueued_at: float

    @property
    def is_released(self) -> bool:
        """Whether the experiment is a pruned trial whose checkpoints have been discarded."""
        return bool((self.spec.get("trial") or {}).get("released"))

    def is_of(self, spec: Spec) -> bool:
        """Whether a spec is this experiment's: the spec hashes are equal, and both or neither belong to trials."""
        return told_apart_by(self.spec, self.spec_hash) == told_apart_by(spec.to_json(), spec.hash)

    def identity(self, fold: int) -> Identity:
        """The identity that every commit of the given fold must have."""
        from mbqueue.storage.manifest import Identity  # noqa: PLC0415 - `status` need not wait for pydantic

        return Identity(experiment=self.name, fold=fold, spec_hash=self.spec_hash, dataset_hash=self.dataset_hash)

    @classmethod
    def from_row(cls, row: Row) -> Experiment:
        return cls(**_fields(cls, row))


@dataclass(frozen=True, kw_only=True)
class SeenSession:
    """What a session announces about itself to sessions that are using a different copy of the queue.

    Attributes:
        alive_until: when the session stops counting as live, unless it ends earlier.
        deadline_at: when the session plans to stop, or None.
    """

    id: str
    host: str
    boot_id: str | None
    pid: int
    pid_started: int | None
    device: str
    started_at: float
    heartbeat_at: float
    alive_until: float
    deadline_at: float | None

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.host, self.boot_id, self.pid, self.pid_started)


@dataclass(frozen=True, kw_only=True)
class SessionRow(SeenSession):
    """One run of a worker.

    Attributes:
        structures_per_second: the session's last training speed, or None.
    """

    ended_at: float | None
    end_reason: str | None
    structures_per_second: float | None

    @classmethod
    def from_row(cls, row: Row) -> SessionRow:
        return cls(**_fields(cls, row))

    def is_live(self, now: float) -> bool:
        """Whether the session is live: it has not ended, and its last heartbeat is recent."""
        return self.ended_at is None and self.alive_until > now


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event: a change of a job's state, or a note. A note has no states (None).

    Attributes:
        by: the session or command that caused the event.
    """

    id: int
    at: float
    job_id: int | None
    experiment: str | None
    kind: Kind | None
    fold: int | None
    epoch: int | None
    by: str
    from_state: State | None
    to_state: State | None
    why: str

    @classmethod
    def from_row(cls, row: Row) -> Event:
        return cls(**_fields(cls, row))
