"""A real PostgreSQL server stops or restarts, and connections to it are lost, even during a commit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest
from children import claimed, drained, start, start_draining
from cutting_proxy import CuttingProxy
from postgres_server import PostgresServer as RunningServer
from processes import until
from transaction_pooler import TransactionPooler

from mbqueue.errors import LeaseLost, QueueError
from mbqueue.queue import Queue, State
from mbqueue.queue.opening import open_on_server
from mbqueue.queue.postgresql import client, listening, patience
from mbqueue.queue.postgresql import server as server_module
from mbqueue.queue.postgresql.server import PostgresServer, exists


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch) -> None:
    """Let leases expire as soon as the server has started."""
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)


@pytest.fixture
def url(postgres_server: RunningServer) -> str:
    return postgres_server.url()


@pytest.fixture
def queue(url: str) -> Iterator[Queue]:
    with open_on_server(url) as queue:
        yield queue


@pytest.fixture
def proxy(postgres_server: RunningServer) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(postgres_server.port)
    yield proxy
    proxy.close()


def test_eight_processes_do_1000_jobs_each_exactly_once_and_each_fold_in_order(queue, url, make_spec, tmp_path):
    for number in range(10):
        spec = make_spec(f"x{number}", folds=(0, 1, 2, 3, 4), epochs=19)
        queue.enqueue(spec, results_dir=f"r{number}", now=0.0)
    jobs = queue.jobs()
    assert len(jobs) == 1020
    lines = drained(queue, start_draining(url, tmp_path, n=8))
    assert Counter(lines) == Counter(f"{job.id} 1" for job in jobs)
    assert len({job.changed_by for job in queue.jobs()}) > 1


def test_behind_a_transaction_pooler_a_waiting_worker_polls(
    queue, postgres_server, url, make_spec, tmp_path, monkeypatch
):
    monkeypatch.setattr(listening, "_PROOF_SECONDS", 0.3)
    queue.enqueue(make_spec(folds=(0, 1, 2, 3, 4), epochs=9), results_dir="r", now=0.0)
    pooler = TransactionPooler(postgres_server.port, connections=2)
    through = postgres_server.url(port=pooler.port, schema=url.rpartition("=")[2])
    with open_on_server(through) as pooled:
        waited = []
        pooled.database.wait(2.0, lambda seconds: bool(waited.append(seconds)))
        assert waited == [2.0]
        drained(pooled, start_draining(through, tmp_path, n=3))
    last_client = max(client for client, _ in pooler.used)
    assert len({connection for client, connection in pooler.used if client == last_client}) == 2
    pooler.close()


def test_a_server_that_crashes_and_comes_back_under_load_loses_no_commit_and_makes_none_twice(
    queue, url, make_spec, tmp_path, postgres_server
):
    for number in range(8):
        queue.enqueue(make_spec(f"x{number}", folds=(0, 1, 2, 3, 4), epochs=29), results_dir=f"r{number}", now=0.0)
    committed = lambda: queue.overview(now=0.0)["jobs"]["committed"]  # noqa: E731
    workers = start_draining(url, tmp_path, n=4)
    for _ in range(3):
        before = committed()
        until(lambda before=before: committed() > before)
        postgres_server.restart()
        assert not queue.outlook(now=0.0).is_exhausted, "the work was over too soon"
    drained(queue, workers)


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(queue, url, make_spec, tmp_path):
    queue.enqueue(make_spec(), results_dir="r", now=0.0)
    stale = start("stale", url, tmp_path)
    assert stale.stdout.readline() == "claimed 1\n"
    os.kill(stale.pid, signal.SIGSTOP)
    try:
        session = queue.start_session(device="cpu", now=0.0, alive_seconds=60)
        lease = None
        while lease is None:  # wait until the lease has expired
            lease = queue.claim(session, now=0.0, lease_seconds=60)
        assert (lease.job.kind, lease.fence) == ("prepare", 2)
        before, events = queue.jobs(), queue.events()
    finally:
        os.kill(stale.pid, signal.SIGCONT)
    told, _ = stale.communicate("continue\n", timeout=60)
    assert told.split() == ["LeaseLost"] * 5
    assert (queue.jobs(), queue.events()) == (before, events)
    assert not (tmp_path / "published-by-the-stale-worker").exists()


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_commit_over_a_broken_connection_happens_and_publishes_once(
    queue, postgres_server, proxy, make_spec, url, cut
):
    schema = url.rpartition("=")[2]
    session, lease = claimed(queue, make_spec)
    with open_on_server(postgres_server.url(port=proxy.port, schema=schema)) as far:
        published = []

        def publish() -> None:
            published.append(1)
            proxy.armed = cut

        far.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)
        assert (proxy.cuts, published) == (1, [1])
        assert [job.label for job in far.jobs(state=State.READY)] == ["full fold 0 epoch 2"]
        commits = [event for event in far.events() if event.to_state == "committed" and event.epoch == 1]
        assert len(commits) == 1
        assert far.claim(session, now=0.0, lease_seconds=60, loaded=(lease.job.experiment_id, 0)).job.epoch == 2


@pytest.mark.parametrize("cut", ["before", "after"])
def test_an_interrupted_commit_claims_the_next_job_once(queue, postgres_server, proxy, make_spec, url, cut):
    _, lease = claimed(queue, make_spec)
    with open_on_server(postgres_server.url(port=proxy.port, schema=url.rpartition("=")[2])) as far:
        published = []

        def publish() -> None:
            published.append(1)
            proxy.armed = cut

        following = far.commit_and_claim(lease, result={}, now=0.0, lease_seconds=60, publish=publish)
        assert (proxy.cuts, published) == (1, [1])
        assert (following.job.label, following.fence) == ("full fold 0 epoch 2", 1)
        assert [job.label for job in far.jobs(state=State.LEASED)] == ["full fold 0 epoch 2"]


def test_a_session_that_is_ended_while_it_commits_keeps_nothing(queue, postgres_server, make_spec, url):
    session, lease = claimed(queue, make_spec)
    publishing, go_on = threading.Event(), threading.Event()

    def publish() -> None:
        publishing.set()
        assert go_on.wait(30)

    with open_on_server(url) as own, ThreadPoolExecutor(2) as threads:
        commit = partial(own.commit_and_claim, lease, result={}, now=0.0, lease_seconds=60, publish=publish)
        committing = threads.submit(commit)
        assert publishing.wait(30)
        ending = threads.submit(queue.end_session, session, reason="its process is gone", now=0.0, lost=True)
        locked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while postgres_server.sql(locked) == [(0,)]:
            assert not ending.done()
            time.sleep(0.01)
        go_on.set()
        assert committing.result(30).job.epoch == 2
        ending.result(30)
    assert not queue.jobs(state=State.LEASED)
    assert [(job.label, job.lost_in_a_row) for job in queue.jobs(state=State.READY)] == [("full fold 0 epoch 2", 1)]


METHODS: dict[str, Callable] = {
    "claim": lambda queue, session, lease: queue.claim(session, now=0.0, lease_seconds=60),
    "renew": lambda queue, session, lease: queue.renew(lease, now=0.0, lease_seconds=60),
    "release": lambda queue, session, lease: queue.release(lease, reason="test", now=0.0),
    "fail": lambda queue, session, lease: queue.fail(lease, error="boom", now=0.0),
    "save_progress": lambda queue, session, lease: queue.save_progress(lease, progress={"step": 1}),
    "pause": lambda queue, session, lease: queue.pause("full", now=0.0),
    "cancel": lambda queue, session, lease: queue.cancel("full", now=0.0),
    "note": lambda queue, session, lease: queue.note("noted", by="me", now=0.0),
    "heartbeat": lambda queue, session, lease: queue.heartbeat(session, now=0.0, alive_seconds=60),
    "start_session": lambda queue, session, lease: queue.start_session(device="cpu", now=0.0, alive_seconds=60),
}


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_connection_changes_neither_the_effect_nor_the_result_of_a_write(
    queue, postgres_server, proxy, make_spec, url, method, cut
):
    claimed(queue, make_spec)
    lease = queue.claim(queue.start_session(device="b", now=0.0, alive_seconds=60), now=0.0, lease_seconds=60)
    assert lease is None
    (lease,) = (job for job in queue.jobs(state=State.LEASED))
    held = queue.session(lease.session)
    with open_on_server(postgres_server.url(port=proxy.port, schema=url.rpartition("=")[2])) as far:
        held_lease = _lease_of(far, lease)
        before = len(queue.events())
        proxy.armed = cut
        answer = METHODS[method](far, held.id, held_lease)
        assert proxy.cuts == 1
        assert answer == {"pause": 5, "cancel": 4}.get(method, answer)
        told = [event.why for event in queue.events()[before:]]
        assert len(told) == {"claim": 0, "renew": 0, "save_progress": 0, "heartbeat": 0, "cancel": 4}.get(method, 1)


def _lease_of(queue: Queue, job):
    from mbqueue.queue import Lease

    return Lease(job=job, session=job.session)


def test_a_publish_cut_off_by_a_crash_counts_when_the_lease_is_still_held(queue, make_spec, postgres_server):
    _, lease = claimed(queue, make_spec)
    published = []

    def publish() -> None:
        assert not published
        published.append(1)
        postgres_server.restart()

    queue.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)
    assert published == [1]
    assert queue.job(lease.job.id).state is State.COMMITTED


def test_after_a_cut_in_publish_a_commit_is_refused_when_another_session_has_the_job(
    queue, url, make_spec, postgres_server
):
    _, lease = claimed(queue, make_spec)

    def publish() -> None:
        postgres_server.restart()
        with open_on_server(url) as other:
            other.rewind("full", {0: "meanwhile"}, to_epoch=0, now=0.0)

    with pytest.raises(LeaseLost):
        queue.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)
    assert queue.job(lease.job.id).state is State.READY


def test_a_heartbeat_survives_a_server_that_is_down_for_a_while(queue, make_spec, postgres_server):
    session, lease = claimed(queue, make_spec)
    postgres_server.stop()
    began = time.monotonic()
    back = threading.Timer(1.5, postgres_server.start)
    back.start()
    queue.heartbeat(session, now=0.0, alive_seconds=60)
    assert time.monotonic() - began > 1.0
    back.join()
    assert queue.renew(lease, now=0.0, lease_seconds=60).fence == lease.fence


def test_a_server_that_stays_down_is_an_error(queue, postgres_server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    postgres_server.stop()
    try:
        with pytest.raises(QueueError, match=r"connection to postgresql://.* was lost .*resume with: mbqueue work"):
            queue.jobs()
        with pytest.raises(QueueError, match="cannot be reached or used"):
            open_on_server(postgres_server.url())
    finally:
        postgres_server.start()


@contextmanager
def _frozen(pid: int, *, seconds: float) -> Iterator[None]:
    """Freeze a process within a ``with`` block, for at most this many seconds."""
    os.kill(pid, signal.SIGSTOP)
    wakes = threading.Timer(seconds, os.kill, [pid, signal.SIGCONT])
    wakes.start()
    try:
        yield
    finally:
        wakes.cancel()
        wakes.join()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _backend(queue: Queue) -> int:
    return int(queue.database._local.client.connection.info.backend_pid)


def test_a_server_that_hangs_without_dying_is_left_for_another_connection(queue, make_spec, monkeypatch):
    session, lease = claimed(queue, make_spec)
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    before = _backend(queue)
    with _frozen(before, seconds=60):
        began = time.monotonic()
        queue.heartbeat(session, now=0.0, alive_seconds=60)
        assert 0.2 < time.monotonic() - began < 20
        assert _backend(queue) != before
        assert queue.renew(lease, now=0.0, lease_seconds=60).fence == lease.fence


def test_a_commit_whose_answer_hangs_is_made_once_and_publishes_once(queue, make_spec, monkeypatch):
    session, lease = claimed(queue, make_spec)
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    published = []
    with ExitStack() as stack:

        def publish() -> None:
            published.append(1)
            stack.enter_context(_frozen(_backend(queue), seconds=1.0))

        queue.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)
    assert published == [1]
    assert [job.label for job in queue.jobs(state=State.READY)] == ["full fold 0 epoch 2"]
    commits = [event for event in queue.events() if event.to_state == "committed" and event.epoch == 1]
    assert len(commits) == 1
    assert queue.claim(session, now=0.0, lease_seconds=60, loaded=(lease.job.experiment_id, 0)).job.epoch == 2


def test_waiting_for_a_server_does_not_change_the_random_state_in_checkpoints(monkeypatch):
    tries = []

    def call() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise client.Interrupted("away")

    before = random.getstate()
    patience.Patience("here").attempt(call, wait=lambda _seconds: False)
    assert len(tries) == 3
    assert random.getstate() == before


class _Starts:
    """A stand-in for the wait between two connection attempts; the first call starts the server."""

    def __init__(self, server: RunningServer) -> None:
        self.server, self.waited = server, []

    def __call__(self, seconds: float) -> bool:
        if not self.waited:
            self.server.start()
        self.waited.append(seconds)
        return False


def test_with_waiting_a_queue_whose_server_is_away_is_found_opened_and_verified(queue, url, postgres_server):
    postgres_server.stop()
    starts = _Starts(postgres_server)
    assert exists(url, wait=starts)
    assert starts.waited

    postgres_server.stop()
    starts = _Starts(postgres_server)
    with open_on_server(url, wait=starts) as opened:
        assert starts.waited
        postgres_server.restart()
        opened.verify()


def test_with_waiting_a_server_without_free_connections_is_waited_for(queue, url, postgres_server):
    postgres_server.sql("CREATE ROLE crowd LOGIN CONNECTION LIMIT 0 IN ROLE postgres")
    waited = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        postgres_server.sql("ALTER ROLE crowd CONNECTION LIMIT -1")
        return False

    assert exists(url.replace("postgres@", "crowd@"), wait=wait)
    assert len(waited) == 1


def test_without_waiting_an_unreachable_server_is_an_error_at_once(queue, url, postgres_server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("it waited"))
    postgres_server.stop()
    try:
        for call in (partial(exists, url), partial(open_on_server, url, read_only=True)):
            with pytest.raises(QueueError, match=r"cannot be reached.*Check that the server runs"):
                call()
    finally:
        monkeypatch.undo()
        postgres_server.start()


def test_permanent_errors_are_raised_at_once(url):
    def wait(_seconds: float) -> bool:
        pytest.fail("it waited")

    elsewhere = url.replace("/postgres?", "/nowhere?")
    for call in (partial(exists, elsewhere, wait=wait), partial(open_on_server, elsewhere, wait=wait)):
        with pytest.raises(QueueError, match="nowhere"):
            call()


def test_waiting_for_a_server_can_be_stopped(queue, url, postgres_server):
    postgres_server.stop()
    try:
        with pytest.raises(QueueError, match="cannot be reached"):
            open_on_server(url, wait=lambda _seconds: True)
    finally:
        postgres_server.start()


def test_no_lease_is_taken_back_just_after_the_servers_start(queue, make_spec, postgres_server, monkeypatch):
    _, lease = claimed(queue, make_spec)
    queue.renew(lease, now=0.0, lease_seconds=1e-3)
    postgres_server.restart()
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 60.0)
    assert queue.reap_expired(by="test", now=0.0) == 0
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)
    assert queue.reap_expired(by="test", now=0.0) == 1


def test_a_silent_workers_transaction_is_rolled_back_and_its_commit_refused(url, make_spec, monkeypatch):
    monkeypatch.setattr(server_module, "SILENCE_SECONDS", 1)  # a connection reads this value when it opens

    def publish() -> None:  # the server ends the idle transaction, which lets the cancellation succeed
        with open_on_server(url) as other:
            other.cancel("full", now=0.0)

    with open_on_server(url) as queue:
        _, lease = claimed(queue, make_spec)
        with pytest.raises(LeaseLost, match="cancelled"):
            queue.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)


def test_while_a_commit_publishes_no_session_takes_its_job_whatever_the_time(queue, url, make_spec):
    _, lease = claimed(queue, make_spec)
    queue.renew(lease, now=0.0, lease_seconds=1e-3)
    seen = []

    def publish() -> None:
        with open_on_server(url) as other:
            session = other.start_session(device="cpu", now=0.0, alive_seconds=60)
            seen.append((other.reap_expired(by="test", now=0.0), other.claim(session, now=0.0, lease_seconds=60)))

    queue.commit(lease, result={"val_mae": 0.1}, now=0.0, publish=publish)
    assert seen == [(0, None)]
    assert queue.job(lease.job.id).state is State.COMMITTED


def test_concurrent_commits_of_two_folds_make_the_dependent_job_ready(queue, url, make_spec, monkeypatch):
    queue.enqueue(make_spec(folds=(0, 1), epochs=0), results_dir="r", now=0.0)
    sessions = [queue.start_session(device="cpu", now=0.0, alive_seconds=3600) for _ in range(2)]
    queue.commit(queue.claim(sessions[0], now=0.0, lease_seconds=60), result={"dataset_hash": "d"}, now=0.0)
    leases = [queue.claim(session, now=0.0, lease_seconds=60) for session in sessions]
    both_done = threading.Barrier(2)
    end = PostgresServer._commit

    def end_together(self, client) -> None:
        with suppress(threading.BrokenBarrierError):  # the wait times out if the other thread is waiting for a lock
            both_done.wait(1.0)
        end(self, client)

    monkeypatch.setattr(PostgresServer, "_commit", end_together)

    def commit(lease) -> None:
        with open_on_server(url) as own:
            own.commit(lease, result={}, now=0.0)

    threads = [threading.Thread(target=commit, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (record,) = (job for job in queue.jobs() if job.kind == "record")
    assert record.state is State.READY


def test_eight_processes_enqueue_an_experiment_only_once(queue, url, make_spec):
    outcomes = []

    def enqueue(fold: int) -> None:
        with open_on_server(url) as own:
            outcome = own.enqueue(make_spec(folds=(fold % 5,), epochs=1), results_dir="r", now=0.0)
            outcomes.append(outcome.outcome)

    threads = [threading.Thread(target=enqueue, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"created": 1, "folds added": 4, "unchanged": 3}
    assert queue.experiment("full").spec["folds"] == [0, 1, 2, 3, 4]
    assert len(queue.jobs()) == 12
