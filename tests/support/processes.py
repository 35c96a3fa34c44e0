"""Real `mbqueue` processes for tests: start, kill and freeze them, and compare their files."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path

from warm import Child, Warm

from mbqueue.project import ProjectFolder
from mbqueue.results.tables import TIMING_COLUMNS, history_file, model_file, predictions_file, read_history
from mbqueue.session import background

PATIENCE_SECONDS = 180


@cache
def warm() -> Warm:
    """The process that all processes of this test run are forked from; all of them end with the test run."""
    return Warm()


def start(root: Path, *arguments: str, log: Path | None = None) -> Child:
    """Start a command of mbqueue in the project at ``root``, with its output in ``log``."""
    return warm().start(root, arguments, log=log or Path(os.devnull), retry_seconds=None, patience=0)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an mbqueue command, and wait until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        process = warm().start(root, arguments, log=out, errors=errors, retry_seconds=None, patience=PATIENCE_SECONDS)
        return subprocess.CompletedProcess(arguments, process.wait(), out.read_text(), errors.read_text())


def start_in_background(project: ProjectFolder, *options: str) -> background.BackgroundSession:
    """Run `mbqueue work --background` without a deadline; return the sessions that it started."""
    done = run(project.root, "work", "--background", "--session", "none", *options)
    assert done.returncode == 0, done.stderr
    started = background.current(project)
    assert started is not None
    return started


def until(condition: Callable[[], bool], process: Child | None = None) -> None:
    """Wait until ``condition`` holds; fail if the process ends first or the wait takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None, f"the process ended early with code {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def kill(process: Child) -> None:
    """Send SIGKILL, and check that the signal ended the process."""
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def freeze(process: Child, queue_db: Path) -> None:
    """Send SIGSTOP while the process does not hold the write lock of the queue's database.

    A process frozen within a write would hold the lock until woken, so no other process could take over its job.
    """
    with closing(sqlite3.connect(queue_db, timeout=0, isolation_level=None)) as probe:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert time.monotonic() < deadline, "another process keeps the write lock"
            process.send_signal(signal.SIGSTOP)
            until(lambda: set(states_of_threads(process.pid)) == {"T"}, process)
            try:
                probe.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
                time.sleep(0.01)
            else:
                probe.execute("ROLLBACK")
                return


def states_of_threads(pid: int) -> list[str]:
    """The state of each thread of a process, for example "S" (sleeping) or "T" (stopped)."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return states


def outcome(folder: Path, fold: int) -> tuple[bytes, bytes, list[dict[str, object]]]:
    """What must be identical in identical runs of a fold: model, predictions, and history except for timing."""
    rows = [
        {key: value for key, value in row.items() if key not in TIMING_COLUMNS}
        for row in read_history(history_file(folder, fold))
    ]
    return model_file(folder, fold).read_bytes(), predictions_file(folder, fold).read_bytes(), rows


@contextmanager
def holding_open(file: Path) -> Iterator[int]:
    """Start a process that keeps a file open, like a session with its queue; yield the process id."""
    holder = [sys.executable, "-c", "import sys; file = open(sys.argv[1]); print(flush=True); input()", str(file)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()
