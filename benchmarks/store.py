"""Count the requests and bytes that checkpoints in an object store take, per job.

    pip install 'mbqueue[objects]' 'moto[server]'
    python -m benchmarks.store                         # on a local S3 server, which the benchmark starts
    python -m benchmarks.store --store s3://bucket/x   # on a real store, with credentials from the environment

The benchmark trains a fold of the sample for a few epochs, first without mid-epoch checkpoints, then with a checkpoint
at every step, and counts the requests to the store. The fold trains the full model, so that sizes are realistic.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbqueue.buckets import STORE_VARIABLE
from mbqueue.experiment import load_spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.jobs import Job
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.report import Report
from mbqueue.session.worker import work
from mbqueue.storage.objects import ObjectStore

#: The operations that S3 bills as writes (PUT, COPY, POST and LIST). S3 does not charge for DELETE requests.
WRITES = {"put", "create", "copy", "list"}


class Counted:
    """A wrapper of a store that counts and times its operations."""

    def __init__(self, real: Any, seen: Counter[str], seconds: dict[str, list[float]]) -> None:
        self._real, self._seen, self._seconds = real, seen, seconds

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._real, name)

        def call(path: str, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            answer = operation(path, *arguments, **options)
            if name == "list":
                answer = list(answer)
            kind = "create" if options.get("mode") == "create" else name
            self._seconds.setdefault(kind, []).append(time.perf_counter() - began)
            self._seen[kind] += 1
            if name == "put":
                self._seen["bytes sent"] += len(arguments[0])
            if name == "get":
                self._seen["bytes read"] += answer.meta["size"]
            return answer

        return call


class PerJob(Report):
    """A report that records the requests and bytes of each job."""

    def __init__(self, seen: Counter[str]) -> None:
        self.seen, self.jobs = seen, list[tuple[str, Counter[str], int]]()
        self._before: Counter[str] = Counter()
        self._steps = 0

    def job_started(self, job: Job) -> None:  # noqa: ARG002 - part of the interface
        self._before, self._steps = Counter(self.seen), 0

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Any) -> None:  # noqa: ARG002
        self._steps = total if what == "step" else self._steps

    def job_finished(self, job: Job, summary: str) -> None:  # noqa: ARG002
        label = job.label.removeprefix("full_finetune ")
        self.jobs.append((label, self.seen - self._before, self._steps))


@contextmanager
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
    )
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield "s3://bucket/benchmark"
    server.stop()


def run(root: Path, url: str, minutes: float, epochs: int) -> PerJob:
    seen: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {}
    opened = ObjectStore.open

    def counting(*given: Any) -> ObjectStore:
        store = opened(*given)
        store.bulk, store.brisk = Counted(store.bulk, seen, seconds), Counted(store.brisk, seen, seconds)
        return store

    ObjectStore.open = counting  # type: ignore[method-assign, assignment]
    os.environ[STORE_VARIABLE] = url
    init_project(root)
    project = ProjectFolder(root, Settings(checkpoint_minutes=minutes))
    overrides = {
        "data.dataset": "sample",
        "data.limit": 40,
        "train.epochs": epochs,
        "train.batch_size": 8,
        "folds": [0],
    }
    spec = load_spec(project.experiment_file("full_finetune"), overrides=overrides)
    with Queue(project.queue_db) as queue:
        queue.enqueue(spec, results_dir=project.results_folder("2026-01-01", spec.folder_name), now=0.0)
    report = PerJob(seen)
    try:
        work(project, WorkOptions(), report=report)
    finally:
        ObjectStore.open = opened  # type: ignore[method-assign]
    for kind, times in sorted(seconds.items()):
        print(f"  {kind:<7} {statistics.median(times) * 1e3:7.1f} ms each (median of {len(times)})")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="URL of an empty prefix in a store")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server() if options.store is None else _given(options.store) as url,
    ):
        for name, minutes in (("no checkpoint within an epoch", 60.0), ("a checkpoint at every step", 1e-9)):
            print(name)
            report = run(Path(folder, name.split()[0]), f"{url}/{name.split()[0]}", minutes, options.epochs)
            for label, cost, steps in report.jobs:
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(cost.items()) if "bytes" not in kind)
                sent, read = cost["bytes sent"] / 1e6, cost["bytes read"] / 1e6
                writes = sum(count for kind, count in cost.items() if kind in WRITES)
                print(
                    f"  {label:<16} {steps:2d} steps: {kinds or 'nothing'}; {writes} billed as writes; "
                    f"{sent:.2f} MB sent, {read:.2f} MB read"
                )


@contextmanager
def _given(url: str) -> Iterator[str]:
    yield url.rstrip("/")


if __name__ == "__main__":
    main()
