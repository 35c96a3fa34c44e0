"""Real `mbqueue` processes for tests: start, kill and freeze them, and compare their files."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mbqueue.results.tables import TIMING_COLUMNS, history_file, model_file, predictions_file, read_history

PATIENCE_SECONDS = 180.0


def start(root: Path, *arguments: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command of mbqueue in the project at ``root``, with its output in ``log``."""
    # Use one thread per process, so that concurrent tests do not compete for cores and compared runs give equal
    # results.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("MBQUEUE_PROJECT", None)
    with (log or Path(os.devnull)).open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mbqueue", "--project", str(root), *arguments],
            stdout=stream,
            stderr=stream,
            env=environment,
        )


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an mbqueue command, and wait until it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "80"}
    environment.pop("MBQUEUE_PROJECT", None)
    return subprocess.run(
        [sys.executable, "-m", "mbqueue", "--project", str(root), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=PATIENCE_SECONDS,
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until ``condition`` holds; fail if the process ends first or the wait takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None, f"the process ended early with code {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL, and check that the signal ended the process."""
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def freeze(process: subprocess.Popen[bytes], queue_db: Path) -> None:
    """Send SIGSTOP while the process does not hold the write lock of the queue's database.

    A process frozen within a write would hold the lock until woken, so no other process could take its job over.
    """
    with closing(sqlite3.connect(queue_db, timeout=0, isolation_level=None)) as probe:
        while True:
            process.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"the process ended instead (status {status})"
            try:
                probe.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
                time.sleep(0.01)
            else:
                probe.execute("ROLLBACK")
                return


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
