"""Worker processes on one queue, and checks of the queue after they have done all jobs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from mbqueue.queue import Queue, State

CHILD = Path(__file__).parents[1] / "queue" / "child.py"


def start(command: str, queue: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start a process that runs a command of child.py on the queue at a path or URL."""
    arguments = [sys.executable, str(CHILD), command, queue, str(folder), *options]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_draining(queue: str, folder: Path, *, n: int) -> subprocess.Popen[str]:
    """Start ``n`` workers that run all jobs; the workers begin at the same time, so that each gets some jobs.

    Returns:
        the process that forked the workers; it ends after them, and fails if one of them fails.
    """
    workers = start("drain", queue, folder, str(n))
    assert workers.stdout is not None
    assert [workers.stdout.readline() for _ in range(n)] == ["ready\n"] * n
    assert workers.stdin is not None
    workers.stdin.write("\n" * n)
    workers.stdin.flush()
    return workers


def claimed(queue: Queue, make_spec, **options):
    """Start a session, and lease epoch 1 of the only fold to it."""
    queue.enqueue(make_spec(folds=(0,), **options), results_dir="r", now=0.0)
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=3600)
    take = lambda: queue.claim(session, now=0.0, lease_seconds=3600)  # noqa: E731
    queue.commit(take(), result={"dataset_hash": "d"}, now=0.0)
    return session, take()


def drained(queue: Queue, workers: subprocess.Popen[str]) -> list[str]:
    """Return the workers' output, after checking that each job was committed once, and each fold in order."""
    lines = workers.communicate(timeout=240)[0].splitlines()
    assert workers.returncode == 0
    assert {job.state for job in queue.jobs()} == {State.COMMITTED}
    events = queue.events(limit=100_000)
    commits = Counter(event.job_id for event in events if event.to_state == "committed")
    assert set(commits.values()) == {1}
    order = [(event.experiment, event.fold, event.epoch) for event in events if event.to_state == "committed"]
    for place in {place[:2] for place in order}:
        epochs = [epoch for *where, epoch in order if tuple(where) == place and epoch is not None]
        assert epochs == sorted(epochs)
    return lines
