"""A worker process for the tests in this folder.

    python child.py COMMAND ADDRESS FOLDER [WORKERS]

The process never imports torch. To `drain` a queue, it forks WORKERS processes, which share its standard streams.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mbqueue.errors import LeaseLost
from mbqueue.queue import Queue

DAY = 86_400.0


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def stale(queue: Queue, folder: Path) -> None:
    """Claim with a short lease, wait for the parent, then try every kind of write; print each outcome."""
    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=0.2)
    lease = queue.claim(session, now=time.time(), lease_seconds=0.2)
    assert lease is not None
    say(f"claimed {lease.fence}")
    sys.stdin.readline()  # the parent freezes this process here until the lease has expired
    now = time.time()
    publish = (folder / "published-by-the-stale-worker").touch
    for write in (
        lambda: queue.renew(lease, now=now, lease_seconds=60),
        lambda: queue.save_progress(lease, progress={"step": 9}, publish=publish),
        lambda: queue.commit(lease, result={"dataset_hash": "stale"}, now=now, publish=publish),
        lambda: queue.release(lease, reason="stale", now=now),
        lambda: queue.fail(lease, error="stale", now=now, final=True),
    ):
        try:
            write()
        except LeaseLost:
            say("LeaseLost")
        else:
            say("written")


def drain(queue: Queue, folder: Path) -> None:
    """Wait for the parent, then claim and commit until no jobs are left; print each job and its fence."""
    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=DAY)
    loaded = None
    say("ready")
    os.read(0, 1)  # a buffered read would take the other workers' signals, too
    while True:
        lease = queue.claim(session, now=time.time(), lease_seconds=DAY, loaded=loaded)
        if lease is None:
            if queue.outlook(now=time.time()).is_exhausted:
                return
            time.sleep(0.002)  # the next jobs depend on jobs that other processes are still running
            continue
        while lease is not None:  # the commit also claims the next job, as in a worker
            if lease.job.fold is not None:
                loaded = (lease.job.experiment_id, lease.job.fold)
            done, result, now = lease, {"dataset_hash": "d"}, time.time()
            lease = queue.commit_and_claim(lease, result=result, now=now, lease_seconds=DAY)
            say(f"{done.job.id} {done.fence}")


def publishing(queue: Queue, folder: Path) -> None:
    """Claim and commit until no jobs are left, publishing a file in each commit; print each job after its commit."""
    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=DAY)
    lease = queue.claim(session, now=time.time(), lease_seconds=DAY)
    while lease is not None:
        path, done, result, now = folder / f"{lease.job.id}-{lease.fence}", lease, {"dataset_hash": "d"}, time.time()
        lease = queue.commit_and_claim(lease, result=result, now=now, lease_seconds=DAY, publish=path.touch)
        say(done.job.id)


def forked(n: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in ``n`` forks of this process; return whether all of them succeeded."""
    pids = []
    for _ in range(n):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:  # noqa: BLE001 - whatever it is, a fork must not return
                traceback.print_exc()
                say("failed")  # the parent may be waiting for "ready"
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in pids] == [0] * n


if __name__ == "__main__":
    command, address, folder, *workers = sys.argv[1:]
    open_queue: Callable[[], Queue] = partial(Queue, Path(address))
    if address.startswith("postgresql:"):
        from mbqueue.queue.postgresql.server import PostgresServer

        open_queue = lambda: Queue(PostgresServer(address, server_clock="conformance" not in address))  # noqa: E731

    def run() -> None:
        with open_queue() as opened:
            {"stale": stale, "drain": drain, "publishing": publishing}[command](opened, Path(folder))

    if command == "drain":
        sys.exit(not forked(int(*workers), run))
    run()
