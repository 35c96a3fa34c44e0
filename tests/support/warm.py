"""Real `mbqueue` processes in a fraction of a second each: forked from one that has imported everything.

What a child does is what the command line does, in a process of its own, which can be killed, frozen and signalled.
Retries come at once and waiting workers look again at once; nothing else is changed.
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
    """A process that was started."""

    warm: Warm
    pid: int

    def signal(self, number: int) -> None:
        """Send it a signal; it must not be waited for before."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, below 0 when a signal ended it."""
        code: int = self.warm.ask({"do": "wait", "pid": self.pid})["code"]
        return code


class Warm:
    """The warm process; use it as a context."""

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
        """One request to the warm process, and its answer."""
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
        """Start commands, one after the other until one fails, in the project at ``root``; their talk goes to ``log``.

        Args:
            fault: what is to go wrong, see `tripwire`.
            trace: file that gets a line for each operation.
            retry_seconds: how long a job rests after its first failure.
            patience: seconds after which it is ended as hanging (code -14).
            watched: below which folder operations are counted; by default ``root``.
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
        """`start`, and wait for the end."""
        return self.start(root, *commands, log=log, **options).wait()
