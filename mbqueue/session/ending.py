"""The command that a person wants run when a session has ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable


def run_end_command(command: str, *, timeout_seconds: float, note: Callable[[str], None]) -> bool:
    """Run the command that ends a session (flush and unmount a drive); whether it ended well and in time.

    What is noted names the setting, not the command: that may hold a secret, and notes are kept in logs.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that everything it starts can be ended with it
    )
    try:
        _, talk = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        note(f"The command of end_command in mbqueue.toml took longer than {timeout_seconds:g} s and was ended")
        return False
    if process.returncode:
        lines = talk.decode(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        note(f"The command of end_command in mbqueue.toml ended with code {process.returncode}{said}")
    return process.returncode == 0
