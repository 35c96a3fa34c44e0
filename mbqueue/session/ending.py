"""Run the user's command at the end of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mbqueue.session.shell import run_shell
from mbqueue.settings import Settings


@contextmanager
def end_command_after(settings: Settings, *, note: Callable[[str], None]) -> Iterator[None]:
    """After the block, run any end command from the settings, even if the block fails."""
    try:
        yield
    finally:
        if settings.end_command:
            run_end_command(settings.end_command, timeout_seconds=settings.end_command_seconds, note=note)


def run_end_command(command: str, *, timeout_seconds: float, note: Callable[[str], None]) -> bool:
    """Run the command that ends a session, for example to unmount a drive; return whether it succeeded in time.

    The note about a failure names the setting, because the command itself may contain a secret and notes end up in
    logs.
    """
    try:
        run_shell(command, timeout_seconds=timeout_seconds)
    except OSError as error:
        note(f"The end_command in mbqueue.toml failed: {error}")
        return False
    return True
