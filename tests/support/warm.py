"""Start real `mbqueue` processes within a fraction of a second, by forking one that has imported everything.

A child process does what the command line does, and tests can kill, freeze and signal it. There are four differences:
CHGNet and its weights are in memory already, Python ignores warnings, the child exits without closing the interpreter,
and the `mbqueue` commands that the child starts are forks of the child, which keep its shortened waits.
`mbqueue demo`, the notebook and the tests of closed terminals run the command itself.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tripwire import Fault


@dataclass
class Child:
    """A started process, with the methods of `subprocess.Popen` that tests use."""

    warm: Warm
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, which is negative if a signal ended the process; None while it is running."""
        if self.returncode is None:
            self.returncode = self.warm.ask({"do": "poll", "pid": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: if the process is still running after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send the process a signal, unless its end has been noticed."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """The warm process. It ends with this process, and then kills the children that are still running."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # While warming up, the process runs a small experiment, which must not use the queue or store of a test.
            env={name: value for name, value in _environment().items() if not name.startswith("MBQUEUE_")},
        )
        atexit.register(self._end)

    def _end(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the warm process; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with self._turn, suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the warm process ended; to see why, run: {sys.executable} {self._process.args[1]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self,
        root: Path,
        *commands: Sequence[str],
        log: Path,
        errors: Path | None = None,
        fault: Fault | None = None,
        trace: Path | None = None,
        retry_seconds: float | None = 0.0,
        patience: int = 120,
        watched: Path | None = None,
    ) -> Child:
        """Run commands in the project at ``root`` until one fails, with their output appended to ``log``.

        Args:
            errors: file for standard error; by default ``log``.
            fault: the fault to cause, see `tripwire`.
            trace: file that gets a line for each operation.
            retry_seconds: seconds until a failed job is retried; None keeps mbqueue's waits, also those for new jobs.
            patience: seconds after which a hanging command is ended (code -14); 0 for never.
            watched: the folder below which operations count; by default ``root``.
        """
        request = {
            "do": "start",
            "root": str(root),
            "commands": [list(command) for command in commands],
            "log": str(log),
            "errors": str(errors or log),
            "environment": _environment(),
            "folder": str(Path.cwd()),
            "fault": asdict(fault) if fault else None,
            "trace": str(trace) if trace else None,
            "retry_seconds": retry_seconds,
            "patience": patience,
            "watched": str(watched or root),
        }
        return Child(self, self.ask(request)["pid"])

    def run(self, root: Path, *commands: Sequence[str], log: Path, **options: Any) -> int:
        """Run `start`, and wait for the end."""
        return self.start(root, *commands, log=log, **options).wait()


def _environment() -> dict[str, str]:
    """This process's environment, with one thread per process, so that concurrent tests do not compete for cores.

    Runs that a test compares then also give equal results.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return (
        {name: value for name, value in os.environ.items() if name != "MBQUEUE_PROJECT"} | threads | {"COLUMNS": "80"}
    )
