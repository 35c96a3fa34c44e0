"""Running a command that a person wrote into the settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress

#: What parts a command into words, and an address in it into its parts.
_BORDERS = re.compile(r"[\s'\"`/?&=;|<>(){},@]+")
_SHORTEST_SECRET = 8


def run_shell(
    command: str, *, timeout_seconds: float, given: bytes = b"", variables: Mapping[str, str] | None = None
) -> None:
    """Run a command by /bin/sh, and wait for its end; after too long it is killed with what it started.

    Args:
        given: its standard input.
        variables: of its environment, beside those that are there.

    Raises:
        TimeoutError: it took too long.
        OSError: it ended with a code other than 0; the message has the last line that it said. What may be a secret
            in the command is not repeated: such messages are kept in logs.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(variables or {})},
        start_new_session=True,  # so that everything it starts can be ended with it
    )
    try:
        _, talk = process.communicate(given, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # What has made itself a session of its own lives on with our pipes: its end is not waited for.
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        raise TimeoutError(f"it took longer than {timeout_seconds:g} s and was ended") from error
    if process.returncode:
        lines = talk.decode(errors="replace").strip().splitlines()
        said = f": {_without_secrets(lines[-1], command)}" if lines else ""
        raise OSError(f"it ended with code {process.returncode}{said}")


def _without_secrets(said: str, command: str) -> str:
    """What a command said, without those of its words that look like a token: long, or not short and with a digit."""
    for word in _BORDERS.split(command):
        if len(word) >= 3 * _SHORTEST_SECRET or (len(word) >= _SHORTEST_SECRET and re.search(r"\d", word)):
            said = said.replace(word, "…")
    return said
