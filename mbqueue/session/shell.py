"""Run a shell command from the settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress

#: Characters that separate the words of a command, or the parts of a web address within a command.
_BORDERS = re.compile(r"[\s'\"`/?&=;|<>(){},@]+")
_SHORTEST_SECRET = 8


def run_shell(
    command: str, *, timeout_seconds: float, given: bytes = b"", variables: Mapping[str, str] | None = None
) -> None:
    """Run a command with /bin/sh and wait until it ends; after the timeout, kill it and everything that it started.

    Args:
        given: bytes to send to the command's standard input.
        variables: environment variables to add for the command.

    Raises:
        TimeoutError: if the command took too long.
        OSError: if the command ended with a nonzero exit code. The message contains the last line of the command's
            standard error, with possible secrets masked, because messages end up in logs.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(variables or {})},
        start_new_session=True,  # a new process group, so that a timeout kills everything that the command started
    )
    try:
        _, talk = process.communicate(given, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # A process that called setsid survives the kill and keeps the pipes open, so do not wait until they close.
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        raise TimeoutError(f"it took longer than {timeout_seconds:g} s and was killed") from error
    if process.returncode:
        lines = talk.decode(errors="replace").strip().splitlines()
        said = f": {_without_secrets(lines[-1], command)}" if lines else ""
        raise OSError(f"it ended with code {process.returncode}{said}")


def _without_secrets(said: str, command: str) -> str:
    """Mask possible secrets in a command's output: long words of the command, and shorter words with a digit."""
    for word in _BORDERS.split(command):
        if len(word) >= 3 * _SHORTEST_SECRET or (len(word) >= _SHORTEST_SECRET and re.search(r"\d", word)):
            said = said.replace(word, "…")
    return said
