"""Readers, threads and forked processes share one queue."""

from __future__ import annotations

import os
import threading


def test_written_data_is_present_after_reopening(world, open_queue):
    world.enqueue()
    jobs = world.queue.jobs()
    world.queue.close()
    assert open_queue().jobs() == jobs
    assert world.queue.jobs() == jobs  # a closed queue reconnects when used


def test_a_reader_sees_a_consistent_snapshot(world, open_queue):
    world.enqueue()
    with world.queue.reading() as db:
        before = db.execute("SELECT count(*) AS n FROM jobs").fetchone()["n"]
        open_queue().enqueue(world.spec("other"), results_dir="results/other", now=world.now)
        assert db.execute("SELECT count(*) AS n FROM jobs").fetchone()["n"] == before
    assert len(world.queue.jobs()) > before


def test_threads_share_a_queue_with_one_connection_each(world):
    session = world.session()
    world.enqueue()
    lease = world.take(session)
    failures = []

    def beat():
        try:
            for _ in range(20):
                world.queue.renew(lease, now=world.now, lease_seconds=60)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=beat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    world.commit(lease)


def test_a_forked_process_gets_a_connection_of_its_own(world):
    world.enqueue()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            world.queue.pause("full", now=world.now, by="child")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert world.queue.experiment("full").paused
    world.queue.resume("full", now=world.now)
