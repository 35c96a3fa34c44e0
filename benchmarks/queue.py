"""Claims and commits per second: mbqueue beside huey, litequeue and persist-queue, all on SQLite, all durable.

    pip install huey litequeue persist-queue
    python -m benchmarks.queue --jobs 1000 100000 --processes 1 4

Every system is set to `synchronous = FULL` and the write-ahead log, holds `--jobs` jobs, and is drained for some
seconds by `--processes` processes that take a job and report it done, each in a transaction of its own. A system
that is not installed is named and left out. What a job costs differs in what it buys: huey deletes the job when it
is taken (a crash loses it) and then stores a result; litequeue marks it by id, whoever asks; persist-queue is for
one process; mbqueue reaps, checks the fence, opens the job's successors and writes two events.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Step = Callable[[], bool]  # take one job and finish it; False when there is none


def fill_mbqueue(folder: Path, jobs: int) -> None:
    from mbqueue.experiment import parse_spec
    from mbqueue.queue import Queue

    epochs = 18  # with predict, 19 jobs a fold; with prepare and record, 97 an experiment
    content = {"name": "x", "data": {"dataset": "sample"}, "train": {"epochs": epochs}}
    spec = parse_spec(content, source="benchmark")
    with Queue(folder / "queue.db") as queue:
        for number in range(-(-jobs // 97)):
            named = spec.model_copy(update={"name": f"x{number}"})
            queue.enqueue(named, results_dir=f"r{number}", now=1.0)


def open_mbqueue(folder: Path) -> Step:
    from mbqueue.queue import Queue

    queue = Queue(folder / "queue.db")
    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=3600)
    loaded: tuple[int, int] | None = None

    def step() -> bool:
        nonlocal loaded
        lease = queue.claim(session, now=time.time(), lease_seconds=60, loaded=loaded)
        if lease is None:
            return False
        loaded = None if lease.job.fold is None else (lease.job.experiment_id, lease.job.fold)
        queue.commit(lease, result={"dataset_hash": "d", "val_mae": 0.03}, now=time.time())
        return True

    return step


def fill_huey(folder: Path, jobs: int) -> None:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=str(folder / "huey.db"), fsync=False)
    for number in range(jobs):
        storage.enqueue(str(number).encode())


def open_huey(folder: Path) -> Step:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=str(folder / "huey.db"), fsync=True, timeout=30)

    def step() -> bool:
        data = storage.dequeue()
        if data is None:
            return False
        storage.put_data(bytes(data), b'{"val_mae": 0.03}', is_result=True)
        return True

    return step


def fill_litequeue(folder: Path, jobs: int) -> None:
    from litequeue import LiteQueue

    queue = LiteQueue(folder / "lite.db")
    queue.conn.execute("PRAGMA synchronous = OFF")
    for number in range(jobs):
        queue.put(str(number))


def open_litequeue(folder: Path) -> Step:
    from litequeue import LiteQueue

    connection = sqlite3.connect(folder / "lite.db", timeout=30)
    queue = LiteQueue(connection)
    connection.execute("PRAGMA synchronous = FULL")

    def step() -> bool:
        message = queue.pop()
        if message is None:
            return False
        queue.done(message.message_id)
        return True

    return step


def fill_persistqueue(folder: Path, jobs: int) -> None:
    from persistqueue import SQLiteAckQueue
    from persistqueue.serializers import json

    queue = SQLiteAckQueue(str(folder / "persist"), serializer=json)
    queue._putter.execute("PRAGMA synchronous = OFF")
    for number in range(jobs):
        queue.put(number)


def open_persistqueue(folder: Path) -> Step:
    from persistqueue import Empty, SQLiteAckQueue
    from persistqueue.serializers import json

    queue = SQLiteAckQueue(str(folder / "persist"), serializer=json)
    for connection in (queue._getter, queue._putter):
        connection.execute("PRAGMA synchronous = FULL")

    def step() -> bool:
        try:
            item = queue.get(block=False, raw=True)
        except Empty:
            return False
        queue.ack(id=item["pqid"])
        return True

    return step


SYSTEMS = {
    "mbqueue": (fill_mbqueue, open_mbqueue),
    "huey": (fill_huey, open_huey),
    "litequeue": (fill_litequeue, open_litequeue),
    "persistqueue": (fill_persistqueue, open_persistqueue),
}


def drain(name: str, folder: Path, seconds: float) -> float:
    """Jobs per second of one process."""
    step = SYSTEMS[name][1](folder)
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds and step():
        done += 1
    return done / passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is printed")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--folder", type=Path, help="where the databases go; it should be on a real disk")
    options = parser.parse_args()
    print(f"SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores")
    measured: dict[tuple[str, int, int], list[float]] = {}
    for name in options.systems:
        if importlib.util.find_spec(name) is None:
            print(f"{name:14}is not installed")
            continue
        for jobs in options.jobs:
            # persist-queue is made for one process
            measured |= {(name, jobs, n): [] for n in options.processes if name != "persistqueue" or n == 1}
    for _ in range(options.rounds):  # in turn, so that what else the disk does falls on all alike
        for (name, jobs, processes), rates in measured.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                SYSTEMS[name][0](Path(scratch), jobs)
                with multiprocessing.get_context("spawn").Pool(processes) as pool:
                    work = [(name, Path(scratch), options.seconds)] * processes
                    rates.append(sum(pool.starmap(drain, work, chunksize=1)))
    print(f"{'system':14}{'jobs':>10}{'processes':>11}{'jobs/s':>10}")
    for (name, jobs, processes), rates in measured.items():
        print(f"{name:14}{jobs:10}{processes:11}{statistics.median(rates):10.0f}")


if __name__ == "__main__":
    main()
