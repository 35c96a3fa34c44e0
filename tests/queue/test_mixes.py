"""Threads run any mix of commands at once, each with its own connection, and the queue stays sound."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg
import pytest

from mbqueue.errors import LeaseLost, QueueError
from mbqueue.queue import Lease, Queue, State
from mbqueue.queue.postgresql import server as server_module

WORKERS, STEERERS = 5, 2
FOLDS, EPOCHS = (0, 1), 3


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases expire as soon as the server has started."""
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)


@pytest.fixture
def deadlocks(monkeypatch: pytest.MonkeyPatch) -> list[psycopg.Error]:
    """The deadlocks that the server reported to its clients; SQLite has none, since it has one writer at a time."""
    found: list[psycopg.Error] = []
    explained = server_module.explained

    def noting(name: str, error: psycopg.Error, client: Any) -> QueueError:
        if isinstance(error, psycopg.errors.DeadlockDetected):
            found.append(error)
        return explained(name, error, client)

    monkeypatch.setattr(server_module, "explained", noting)
    return found


class Mix:
    """Threads that run random commands on one queue."""

    def __init__(self, open_queue: Callable[[], Queue], make_spec: Callable[..., Any], *, ending_others: bool) -> None:
        self._open, self._make_spec, self._ending_others = open_queue, make_spec, ending_others
        self._sessions: list[str] = []
        self._troubles: list[BaseException] = []

    def run(self) -> None:
        """Run all threads, and check that they raised no errors except for lost leases."""
        actions = [(self._work, seed) for seed in range(WORKERS)] + [(self._steer, seed) for seed in range(STEERERS)]
        threads = [threading.Thread(target=self._noting_trouble, args=action) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self._troubles == []

    def _noting_trouble(self, action: Callable[[int], None], seed: int) -> None:
        try:
            action(seed)
        except BaseException as error:
            self._troubles.append(error)
            raise

    def _session(self, queue: Queue) -> str:
        self._sessions.append(queue.start_session(device="cpu", now=time.time(), alive_seconds=60))
        return self._sessions[-1]

    def _work(self, seed: int) -> None:
        draw, queue, loaded, lease = random.Random(seed), self._open(), None, None
        session = self._session(queue)
        for _ in range(60):
            seconds = draw.choice([0.01, 60])
            if lease is None:
                try:
                    lease = queue.claim(session, now=time.time(), lease_seconds=seconds, loaded=loaded)
                except QueueError:  # a different thread has ended this session
                    assert self._ending_others
                    session = self._session(queue)
                if lease is None:
                    continue
            held, lease = lease, None
            if held.job.fold is not None:
                loaded = (held.job.experiment_id, held.job.fold)
            with suppress(LeaseLost):
                lease = self._write(draw, queue, held, seconds)
        queue.end_session(session, reason="test", now=time.time())

    def _write(self, draw: random.Random, queue: Queue, held: Lease, seconds: float) -> Lease | None:
        now = time.time()
        publish = partial(time.sleep, draw.uniform(0, 0.01))
        commit = {"result": {"dataset_hash": "d"}, "now": now, "publish": publish}
        stops = "enough" if held.job.kind == "train" and draw.random() < 0.1 else None
        writes: list[Callable[[], Any]] = [
            partial(queue.commit_and_claim, held, lease_seconds=seconds, skip_rest=stops, **commit),
            partial(queue.commit, held, **commit),
            partial(queue.save_progress, held, progress={"step": 1}, publish=publish),
            partial(queue.release, held, reason="test", now=now),
            partial(queue.fail, held, error="boom", now=now),
        ]
        given = draw.choices(writes, [8, 3, 1, 1, 1])[0]()
        return given if isinstance(given, Lease) else None

    def _steer(self, seed: int) -> None:
        draw, queue = random.Random(seed), self._open()
        for _ in range(40):
            name, fold, now = draw.choice("ab"), draw.choice([None, *FOLDS]), time.time()
            draw.choice([queue.pause, queue.resume, queue.retry, queue.cancel])(name, fold=fold, now=now)
            queue.set_priority(name, draw.randint(0, 5), fold=fold, now=now)
            again = draw.sample(FOLDS, draw.randint(0, 2))
            queue.rewind(name, dict.fromkeys(again, "test"), to_epoch=draw.choice([0, 2]), now=now)
            folds = draw.choice([(0, 1), (1, 2), (3,)])
            queue.enqueue(self._make_spec(name, folds=folds, epochs=EPOCHS), results_dir=name, now=now)
            queue.reap_expired(by="test", now=now)
            if self._ending_others and self._sessions:
                queue.end_session(draw.choice(self._sessions), reason="ended by another", now=now, lost=True)


@pytest.mark.parametrize("ending_others", [False, True])
def test_any_mix_of_commands_leaves_a_queue_that_can_be_finished(open_queue, make_spec, deadlocks, ending_others):
    queue = open_queue()
    for name in "ab":
        queue.enqueue(make_spec(name, folds=FOLDS, epochs=EPOCHS), results_dir=name, now=time.time())
    Mix(open_queue, make_spec, ending_others=ending_others).run()
    # Ending a session takes the locks in a different order than a claim by that session. If the two deadlock, the
    # database aborts one of them, and mbqueue retries it.
    assert ending_others or deadlocks == []
    assert queue.jobs(state=State.LEASED) == (), "by sessions that have all ended"

    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=3600)
    for experiment in queue.experiments():
        for fold in (None, *experiment.spec["folds"]):
            queue.resume(experiment.name, fold=fold, now=time.time())
            queue.retry(experiment.name, fold=fold, now=time.time())
    while lease := queue.claim(session, now=time.time(), lease_seconds=60):
        queue.commit(lease, result={"dataset_hash": "d"}, now=time.time())
    assert {job.state for job in queue.jobs()} <= {State.COMMITTED, State.SKIPPED}
    told: dict[int, State] = {}
    for event in queue.events(limit=100_000):
        if event.job_id is not None:  # `from_state` is the state after the job's previous event
            assert event.from_state == told.get(event.job_id)
            told[event.job_id] = event.to_state
    assert told == {job.id: job.state for job in queue.jobs()}
