"""A queue on every backend, with a clock that only tests advance.

Tests of behaviour use only `world` or `open_queue`, so a new backend is one more entry in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mbqueue.experiment import Spec, parse_spec
from mbqueue.queue import EnqueueOutcome, Job, Kind, Lease, Queue, State
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.dialect import SQLITE
from mbqueue.queue.opening import open_on_server
from mbqueue.queue.postgresql.server import PostgresServer
from mbqueue.queue.schema import TABLES


def _on_sqlite(folder: Path, request: pytest.FixtureRequest) -> Queue:
    return Queue(folder / "state" / "queue.db")


def _on_postgresql(folder: Path, request: pytest.FixtureRequest) -> Queue:
    return Queue(PostgresServer(postgres_url(folder, request), server_clock=False))


def postgres_url(folder: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a folder's queue: one schema, emptied for each new folder."""
    server = request.getfixturevalue("postgres_server")
    url = server.url(schema="conformance")
    if server.holds != folder:
        open_on_server(url).close()
        server.empty("conformance", TABLES)
        server.holds = folder
    return url


BACKENDS: dict[str, Callable[[Path, pytest.FixtureRequest], Queue]] = {
    "postgresql": _on_postgresql,
    "sqlite": _on_sqlite,
}

LEASE = 60.0


def make_spec(name: str = "full", *, folds: tuple[int, ...] = (0, 1), epochs: int = 2, **train: Any) -> Spec:
    """A small valid experiment."""
    trainable = "all" if epochs else "none"
    content = {
        "name": name,
        "folds": folds,
        "data": {"dataset": "sample"},
        "model": {"trainable": trainable},
        "train": {"epochs": epochs, **train},
    }
    return parse_spec(content, source="test")


class World:
    """A queue, sessions and a clock.

    `address` is where other processes find the queue: the path of its file, or its URL.
    """

    def __init__(self, queue: Queue, address: str = "") -> None:
        self.queue, self.address = queue, address
        self.now = 1_000_000.0

    def spec(self, name: str = "full", **options: Any) -> Spec:
        return make_spec(name, **options)

    def enqueue(self, name: str = "full", *, priority: int = 0, **options: Any) -> EnqueueOutcome:
        return self.queue.enqueue(
            make_spec(name, **options), results_dir=f"results/{name}", priority=priority, now=self.now
        )

    def session(self, *, alive_seconds: float = LEASE) -> str:
        return self.queue.start_session(device="cpu", now=self.now, alive_seconds=alive_seconds)

    def claim(self, session: str, *, loaded: tuple[int, int] | None = None, seconds: float = LEASE) -> Lease | None:
        return self.queue.claim(session, now=self.now, lease_seconds=seconds, loaded=loaded)

    def take(self, session: str, *, loaded: tuple[int, int] | None = None, seconds: float = LEASE) -> Lease:
        """Claim a job, and check that there was one."""
        lease = self.claim(session, loaded=loaded, seconds=seconds)
        assert lease is not None
        return lease

    def commit(self, lease: Lease, **result: Any) -> None:
        self.queue.commit(lease, result={"dataset_hash": "d" * 64, **result}, now=self.now)

    def prepared(self, session: str, name: str = "full", **options: Any) -> None:
        """Enqueue an experiment and commit its `prepare`."""
        self.enqueue(name, **options)
        lease = self.take(session)
        assert lease.job.kind == "prepare"
        self.commit(lease)

    def finish(self, session: str) -> list[str]:
        """Run all jobs, preferring the loaded fold as a worker does; return the jobs' labels in order."""
        done, loaded = [], None
        while lease := self.claim(session, loaded=loaded):
            if lease.job.fold is not None:
                loaded = (lease.job.experiment_id, lease.job.fold)
            self.commit(lease, val_mae=0.05, seconds=1.0)
            done.append(lease.job.label)
        return done

    def find(self, label: str) -> Job:
        (job,) = (job for job in self.queue.jobs() if job.label == label)
        return job

    def states(self, experiment: str = "full") -> dict[str, str]:
        return {
            job.label.removeprefix(f"{experiment} "): job.state.value for job in self.queue.jobs(experiment=experiment)
        }


@pytest.fixture(params=sorted(BACKENDS))
def open_queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Queue]]:
    """Open the queue of this test; a second call opens the same queue as another process would."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(BACKENDS[request.param](tmp_path, request))


@pytest.fixture
def world(open_queue: Callable[[], Queue], tmp_path: Path, request: pytest.FixtureRequest) -> World:
    queue = open_queue()
    is_sqlite = queue.database.dialect is SQLITE
    return World(queue, queue.database.name if is_sqlite else postgres_url(tmp_path, request))


@pytest.fixture(params=sorted(BACKENDS))
def open_queue_in(request: pytest.FixtureRequest) -> Callable[[Path], Queue]:
    """Open a queue in a given folder, for tests that need several."""
    return lambda folder: BACKENDS[request.param](folder, request)


@pytest.fixture(name="make_spec", scope="session")
def _make_spec() -> Callable[..., Spec]:
    """Create a small valid experiment, for fixtures that outlive a test."""
    return make_spec


@dataclass
class ModelJob:
    """A job in `Model`."""

    key: tuple[str, Kind, int | None, int | None]
    order: int
    needs: list[ModelJob]
    priority: int = 0
    paused: bool = False
    state: State = State.WAITING
    started: bool = False
    fence: int = 0
    session: str | None = None
    expires: float = 0.0
    affinity: str | None = None
    failures: int = 0
    preemptions: int = 0
    lost: int = 0
    not_before: float = 0.0
    rewound: list[tuple[str, str]] = field(default_factory=list)
    is_pruned: bool = False  # whether the job was skipped because its trial was pruned

    @property
    def is_done(self) -> bool:
        return self.state in {State.COMMITTED, State.SKIPPED}

    @property
    def is_free(self) -> bool:
        return self.state is State.WAITING and all(job.is_done for job in self.needs)

    def drop_lease(self, state: State) -> None:
        self.state, self.session, self.expires = state, None, 0.0


@dataclass
class Model:
    """A model of the queue in plain Python."""

    jobs: dict[tuple[str, Kind, int | None, int | None], ModelJob] = field(default_factory=dict)
    alive_until: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        key: tuple[str, Kind, int | None, int | None],
        needs: list[ModelJob],
        *,
        priority: int = 0,
        paused: bool = False,
    ) -> ModelJob:
        self.jobs[key] = ModelJob(key, len(self.jobs), needs, priority, paused)
        return self.jobs[key]

    def of(self, name: str, fold: int | None = None) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.key[0] == name and fold in {None, job.key[2]}]

    def settle(self, name: str) -> None:
        for job in self.of(name):
            if job.is_free:
                job.state = State.READY

    def reap(self, now: float) -> None:
        for job in self.jobs.values():
            if job.state is State.LEASED and job.expires <= now:
                job.lost, job.preemptions, job.affinity = job.lost + 1, job.preemptions + 1, None
                job.drop_lease(State.READY if job.lost < MAX_LOST_IN_A_ROW else State.FAILED)

    def choose(self, session: str, now: float, loaded: tuple[str, int] | None) -> ModelJob | None:
        busy = {job.session for job in self.jobs.values() if job.state is State.LEASED}
        others = {name for name, until in self.alive_until.items() if until > now and name != session} - busy
        open_jobs = [
            job
            for job in self.jobs.values()
            if job.state is State.READY and not job.paused and job.not_before <= now and job.affinity not in others
        ]
        return min(
            open_jobs,
            key=lambda job: (job.key[0::2][:2] != loaded, -job.priority, not job.started, job.order),
            default=None,
        )


@pytest.fixture
def make_model() -> Callable[[], Model]:
    """Create the model that the state machine compares with the queue."""
    return Model
