"""Real worker processes compete for jobs, and some are frozen or killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter

import pytest
from children import start, start_draining
from processes import until

from mbqueue.queue import State
from mbqueue.queue.dialect import SQLITE

_TRANSACTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^mbqueue [0-9a-f]+$'"


def _read_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline()
    assert line, "the child ended early"
    return line.strip()


def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(world, tmp_path):
    world.enqueue()
    stale = start("stale", world.address, tmp_path)
    assert _read_line(stale) == "claimed 1"
    os.kill(stale.pid, signal.SIGSTOP)
    try:
        world.now = time.time() + 1  # by the next holder's clock, the lease of 0.2 s has expired
        session = world.session()
        lease = world.take(session)
        assert (lease.job.kind, lease.fence) == ("prepare", 2)
        before, events = world.queue.jobs(), world.queue.events()
    finally:
        os.kill(stale.pid, signal.SIGCONT)
    told, _ = stale.communicate("continue\n", timeout=60)
    assert told.split() == ["LeaseLost"] * 5
    assert (world.queue.jobs(), world.queue.events()) == (before, events)
    assert not (tmp_path / "published-by-the-stale-worker").exists()
    world.commit(lease)
    assert world.queue.experiment("full").dataset_hash == "d" * 64


@pytest.mark.parametrize("open_queue", ["sqlite"], indirect=True)  # test_server_failures.py does it on a server
def test_many_processes_do_500_jobs_each_exactly_once(world, tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        world.enqueue(name, folds=(0, 1, 2, 3, 4), epochs=19)
    jobs = world.queue.jobs()
    assert len(jobs) == 510
    workers = start_draining(world.address, tmp_path, n=6)
    lines = workers.communicate(timeout=120)[0].splitlines()
    assert workers.returncode == 0
    assert Counter(lines) == Counter(f"{job.id} 1" for job in jobs)
    assert {job.state for job in world.queue.jobs()} == {State.COMMITTED}
    commits = Counter(event.job_id for event in world.queue.events(limit=100_000) if event.to_state == "committed")
    assert set(commits.values()) == {1}
    assert len({job.changed_by for job in world.queue.jobs()}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_sigkill_during_commits_leaves_no_partial_commit_and_loses_none(world, tmp_path, seed, request):
    files = tmp_path / "files"
    files.mkdir()
    world.enqueue(folds=(0, 1, 2, 3, 4), epochs=100)
    worker = start("publishing", world.address, files)
    said = [_read_line(worker)]
    time.sleep(random.Random(seed).uniform(0.0, 0.15))  # the seed determines when to kill the worker
    worker.kill()
    said += worker.stdout.read().splitlines()  # communicate() would lose buffered lines
    worker.communicate()

    if world.queue.database.dialect is SQLITE:
        connection = sqlite3.connect(world.address)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()
    else:  # the server may still be running the killed worker's last statement
        postgres_server = request.getfixturevalue("postgres_server")
        until(lambda: postgres_server.sql(_TRANSACTIONS) == [(0,)])
    jobs = {job.id: job for job in world.queue.jobs()}
    committed = {job_id for job_id, job in jobs.items() if job.state is State.COMMITTED}
    # The queue contains every commit that a worker reported, and at most one that no worker reported.
    assert {int(line) for line in said} <= committed
    assert len(committed) - len(said) <= 1
    published = {tuple(int(part) for part in path.name.split("-")) for path in files.iterdir()}
    # A worker publishes its file before its transaction commits.
    assert {(job_id, jobs[job_id].fence) for job_id in committed} <= published
    (orphan, *more) = published - {(job_id, jobs[job_id].fence) for job_id in committed} or [None]
    assert more == []
    if orphan is not None:  # the worker died after publishing this file and before committing its transaction
        assert jobs[orphan[0]].state is State.LEASED
    seen = {(event.job_id, event.to_state) for event in world.queue.events(limit=100_000)}
    assert {(job, state) for job in committed for state in (State.LEASED, State.COMMITTED)} <= seen
    me = world.session()
    world.now = time.time()
    world.queue.reap_dead(by=me, now=world.now)
    assert world.queue.jobs(state=State.LEASED) == ()
    assert len(world.queue.jobs(state=State.READY)) == (1 if jobs_after_prepare(jobs) == 0 else 5 - done_folds(jobs))


def jobs_after_prepare(jobs) -> int:
    return sum(job.state is State.COMMITTED and job.kind == "prepare" for job in jobs.values())


def done_folds(jobs) -> int:
    return sum(job.state is State.COMMITTED and job.kind == "predict" for job in jobs.values())
