"""Start real `mbqueue` processes within a fraction of a second, by forking one that has imported everything.

A child process does what the command line does, and tests can kill, freeze and signal it. The only difference is that
workers wait for a shorter time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tripwire import Fault


@dataclass(frozen=True)
class Child:
    """A started process."""

    warm: Warm
    pid: int

    def signal(self, number: int) -> None:
        """Send the process a signal; call this method before `wait`."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the exit code, which is negative if a signal ended the process."""
        code: int = self.warm.ask({"do": "wait", "pid": self.pid})["code"]
        return code


class Warm:
    """The warm process, as a context manager."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("MBQUEUE_PROJECT", None)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the warm process; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        root: Path,
        *commands: Sequence[str],
        log: Path,
        fault: Fault | None = None,
        trace: Path | None = None,
        retry_seconds: float = 0.0,
        patience: int = 120,
        watched: Path | None = None,
    ) -> Child:
        """Run commands in the project at ``root`` until one fails, with their output in ``log``.

        Args:
            fault: the fault to cause, see `tripwire`.
            trace: file that gets a line for each operation.
            retry_seconds: seconds until a failed job is retried.
            patience: seconds after which a hanging command is ended (code -14).
            watched: the folder below which operations count; by default ``root``.
        """
        request = {
            "do": "start",
            "root": str(root),
            "commands": [list(command) for command in commands],
            "log": str(log),
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
