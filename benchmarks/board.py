"""Measure how much ten open pages of the board slow down a worker that commits jobs, on a queue of 100,000 jobs.

    python -m benchmarks.board --folder FOLDER

Choose a FOLDER on a real disk. A worker claims and commits jobs for a few seconds, alternately without a board and with
a board that ten browsers poll every two seconds. The benchmark prints the median ratio of the two rates, and the
board's CPU time per update of a page.
"""

from __future__ import annotations

import argparse
import http.client
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from mbqueue.api import Project
from mbqueue.queue.opening import open_queue
from mbqueue.queue.store import Queue

PERIOD_SECONDS = 2.0
LEASE_SECONDS = 600.0
#: With this number of epochs, an experiment has 997 jobs, including prepare, five predictions and record.
_EPOCHS = 198
#: A result that is valid for every kind of job.
_RESULT = {"dataset_hash": "d" * 64, "seconds": 1.0, "val_mae": 0.05, "test_mae": None}
_SERVE = "import sys; from mbqueue.cli import main; main(['--project', sys.argv[1], 'board', '--port', '0'])"


def fill(project: Project, jobs: int) -> None:
    """Enqueue experiments until there are about this many jobs."""
    for number in range(max(1, round(jobs / 997))):
        project.enqueue("full_finetune", dataset="sample", epochs=_EPOCHS, name=f"x{number}")


def committed(queue: Queue, session: str, seconds: float) -> float:
    """Measure how many jobs one worker commits per second."""
    began, done = time.perf_counter(), 0
    lease = queue.claim(session, now=time.time(), lease_seconds=LEASE_SECONDS)
    while lease is not None and time.perf_counter() - began < seconds:
        lease = queue.commit_and_claim(lease, result=_RESULT, now=time.time(), lease_seconds=LEASE_SECONDS)
        done += 1
    rate = done / (time.perf_counter() - began)
    if lease is not None:
        queue.release(lease, reason="the benchmark's round is over", now=time.time())
    return rate


def look(port: int, page: str, over: threading.Event, updates: list[int]) -> None:
    """Poll a page as a browser does."""
    tag = ""
    while not over.wait(PERIOD_SECONDS):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", page, headers={"If-None-Match": tag} if tag else {})
        answer = connection.getresponse()
        answer.read()
        tag = answer.headers["ETag"] or ""
        updates.append(answer.status)
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        project = Project.create(scratch)
        fill(project, options.jobs)
        ratios, updates = [], []
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open_queue(project.folder) as queue:
            session = queue.start_session(device="benchmark", now=time.time(), alive_seconds=LEASE_SECONDS)
            committed(queue, session, 3.0)
            for _ in range(options.rounds):
                alone = committed(queue, session, options.seconds)
                beside = committed_beside(project, queue, session, options, updates)
                ratios.append(beside / alone)
                print(f"jobs/s: {alone:7.1f} alone, {beside:7.1f} beside {options.pages} pages", flush=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        print(f"{len(updates)} answers, {spent / len(updates) * 1000:.0f} ms of CPU time each, including start-up")
        print(f"rate beside the board / alone: {statistics.median(ratios):.2f} (median of {len(ratios)})")


def committed_beside(
    project: Project, queue: Queue, session: str, options: argparse.Namespace, updates: list[int]
) -> float:
    """Measure the worker's rate, in jobs per second, while a board runs and pages are open."""
    command = [sys.executable, "-c", _SERVE, str(project.folder.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as board:
        assert board.stdout is not None
        port = int(board.stdout.readline().strip().rstrip("/").rsplit(":", 1)[1])
        over = threading.Event()
        pages = ["/part?part=overview", "/part?part=experiment&name=x0"]
        looking = [
            threading.Thread(target=look, args=(port, pages[number % 2], over, updates))
            for number in range(options.pages)
        ]
        for thread in looking:
            thread.start()
        rate = committed(queue, session, options.seconds)
        over.set()
        for thread in looking:
            thread.join()
        board.terminate()
    return rate


if __name__ == "__main__":
    main()
