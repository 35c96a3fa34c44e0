"""Identify processes on this machine, and find out whether they are alive."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """The identity of one process.

    Attributes:
        boot_id: identifies the machine's boot and the process namespace in which `pid` is valid; None if unknown.
        pid_started: start of the process in clock ticks since boot, which differs if another process reuses the pid.
    """

    host: str
    boot_id: str | None
    pid: int
    pid_started: int | None


def this_process() -> ProcessIdentity:
    return identity_of(os.getpid())


def identity_of(pid: int) -> ProcessIdentity:
    """The identity of the process that currently has the given pid on this machine."""
    return ProcessIdentity(host=socket.gethostname(), boot_id=boot_id(), pid=pid, pid_started=_started(pid))


def boot_id() -> str | None:
    """The kernel's random id for this boot, with the id of the process namespace; None if either cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return None
    return f"{boot}/{namespace}"


def is_known_dead(identity: ProcessIdentity) -> bool:
    """Whether the process is known to be dead; False if unknown, for example because it runs in another container.

    A process may be alive although /proc does not list it, because the mount option ``hidepid`` hides the processes of
    other users.
    """
    if identity.boot_id is None or identity.boot_id != boot_id():
        return False
    try:
        os.kill(identity.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # the process exists and belongs to another user
    stat = _stat(identity.pid)
    if stat is None:
        return False
    return _is_over(stat) or (identity.pid_started is not None and int(stat[19]) != identity.pid_started)


def is_known_living(identity: ProcessIdentity) -> bool:
    """Whether the process is known to be alive, even if it is suspended or hanging; False if unknown."""
    if identity.boot_id is None or identity.boot_id != boot_id() or identity.pid_started is None:
        return False
    return _started(identity.pid) == identity.pid_started


def has_open(identity: ProcessIdentity, file: Path) -> bool | None:
    """Whether a live process has a file open; None if unknown, for example because another user started the process.

    A copy of the file counts as a different file, and a renamed file as the same file.
    """
    if not is_known_living(identity):
        return None
    try:
        wanted = file.stat()
        descriptors = list(Path(f"/proc/{identity.pid}/fd").iterdir())
    except OSError:
        return None
    for descriptor in descriptors:
        try:
            found = descriptor.stat()
        except FileNotFoundError:
            continue  # the file was closed in the meantime
        except OSError:
            return None
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def is_gone(identity: ProcessIdentity, queue_file: Path | None) -> bool:
    """Whether a session's process is known not to use the queue: it is dead, or doesn't have the queue's file open.

    A copied queue still lists the original queue's sessions, and their processes may be alive.

    Args:
        queue_file: the SQLite file; None for a queue on a server.
    """
    if is_known_dead(identity):
        return True
    if queue_file is None or identity.pid == os.getpid():
        return False
    return has_open(identity, queue_file) is False


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None if the process is gone or hidden."""
    stat = _stat(pid)
    return None if stat is None else int(stat[1])


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None without /proc, or if the process is gone or a zombie."""
    stat = _stat(pid)
    return None if stat is None or _is_over(stat) else int(stat[19])


def _is_over(stat: list[str]) -> bool:
    """Whether a process is a zombie: it has ended, but its parent has not collected its exit status."""
    return stat[0] in {"Z", "X"}


def _stat(pid: int) -> list[str] | None:
    """Read the fields of /proc/PID/stat, beginning with the state (the third field); None if there is no such file."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # In /proc/PID/stat, the second field is the program's name in brackets, which may itself contain spaces and
    # brackets.
    return stat.rpartition(")")[2].split()
