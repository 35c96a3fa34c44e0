"""A queue on every backend, with a clock that stands still until a test moves it.

The behaviour tests ask only for `world` (or `open_queue`), so a further backend is one more entry in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mbqueue.experiment import Spec, parse_spec
from mbqueue.queue import EnqueueOutcome, Job, Lease, Queue

BACKENDS: dict[str, Callable[[Path], Queue]] = {
    "sqlite": lambda folder: Queue(folder / "state" / "queue.db"),
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
    """A queue, sessions and a clock."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
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
        """A claim that must give something."""
        lease = self.claim(session, loaded=loaded, seconds=seconds)
        assert lease is not None
        return lease

    def commit(self, lease: Lease, **result: Any) -> tuple[Job, ...]:
        return self.queue.commit(lease, result={"dataset_hash": "d" * 64, **result}, now=self.now)

    def prepared(self, session: str, name: str = "full", **options: Any) -> None:
        """An experiment whose `prepare` is committed."""
        self.enqueue(name, **options)
        lease = self.take(session)
        assert lease.job.kind == "prepare"
        self.commit(lease)

    def finish(self, session: str) -> list[str]:
        """Do all that can be done, as a worker that keeps to the fold it has loaded; labels in order."""
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
    """Opens the queue of this test; called again, it opens the same one as another process would."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(BACKENDS[request.param](tmp_path))


@pytest.fixture
def world(open_queue: Callable[[], Queue]) -> World:
    return World(open_queue())


@pytest.fixture(params=sorted(BACKENDS))
def open_queue_in(request: pytest.FixtureRequest) -> Callable[[Path], Queue]:
    """Opens a queue in a given folder, for tests that need many."""
    return BACKENDS[request.param]


@pytest.fixture(name="make_spec", scope="session")
def _make_spec() -> Callable[..., Spec]:
    """Makes a small valid experiment, for fixtures that outlive one test."""
    return make_spec
