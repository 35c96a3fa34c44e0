"""Run a command from the settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress

#: The characters that separate the words of a command, and the parts of an address in a command.
_BORDERS = re.compile(r"[\s'\"`/?&=;|<>(){},@]+")
_SHORTEST_SECRET = 8


def run_shell(
    command: str, *, timeout_seconds: float, given: bytes = b"", variables: Mapping[str, str] | None = None
) -> None:
    """Run a command with /bin/sh and wait until it ends; after the timeout, kill it and everything that it started.

    Args:
        given: the command's standard input.
        variables: added to the command's environment.

    Raises:
        TimeoutError: if the command took too long.
        OSError: if the command ended with a code other than 0. The message has the last line of the output, without
            words of the command that may be secret, because logs keep messages.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(variables or {})},
        start_new_session=True,  # its own process group, so that everything it starts can be killed with it
    )
    try:
        _, talk = process.communicate(given, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # A process that started its own session survives with our pipes open, so do not wait for the pipes to close.
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
    """A command's output without the command's secret-looking words: long, or of medium length with a digit."""
    for word in _BORDERS.split(command):
        if len(word) >= 3 * _SHORTEST_SECRET or (len(word) >= _SHORTEST_SECRET and re.search(r"\d", word)):
            said = said.replace(word, "…")
    return said
