"""The identity of a process, distinct from every other one on this machine, and whether that process is alive."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """One process.

    Attributes:
        boot_id: the machine's boot and the process namespace within which `pid` is valid; None if the system does not
            reveal it.
        pid_started: start of the process in clock ticks since boot, which a later process with the same pid does not
            share.
    """

    host: str
    boot_id: str | None
    pid: int
    pid_started: int | None


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    return identity_of(os.getpid())


def identity_of(pid: int) -> ProcessIdentity:
    """The identity of the process with this pid, on this machine, now."""
    return ProcessIdentity(host=socket.gethostname(), boot_id=boot_id(), pid=pid, pid_started=_started(pid))


def boot_id() -> str | None:
    """The kernel's random id of this boot with the id of the process namespace (containers), or None."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return None
    return f"{boot}/{namespace}"


def is_known_dead(identity: ProcessIdentity) -> bool:
    """Whether the process is certainly dead. Without proof (another machine, boot or container): False.

    Absence from /proc proves nothing: mounted with ``hidepid``, it hides other users' processes.
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
    """Whether the process is certainly alive, even if stopped or hanging. Without proof: False."""
    if identity.boot_id is None or identity.boot_id != boot_id() or identity.pid_started is None:
        return False
    return _started(identity.pid) == identity.pid_started


def has_open(identity: ProcessIdentity, file: Path) -> bool | None:
    """Whether a live process of this machine has a file open; None without proof (another user or machine).

    A copy of the file is a different file; a renamed file is the same.
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
    """Whether a session's process certainly does not use this queue: it is dead, or uses another file.

    The rows of a copied queue name the sessions of the original, whose processes may be alive.

    Args:
        queue_file: the SQLite file; None for a queue on a server.
    """
    if is_known_dead(identity):
        return True
    if queue_file is None or identity.pid == os.getpid():
        return False
    return has_open(identity, queue_file) is False


def parent_of(pid: int) -> int | None:
    """The parent of this process; None if it is gone or hidden."""
    stat = _stat(pid)
    return None if stat is None else int(stat[1])


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None without /proc, or if the process is gone or a zombie."""
    stat = _stat(pid)
    return None if stat is None or _is_over(stat) else int(stat[19])


def _is_over(stat: list[str]) -> bool:
    """Whether a process has ended and its parent has not yet collected its exit status."""
    return stat[0] in {"Z", "X"}


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (the third field in proc(5)); None if /proc has no such file."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the program's name in brackets, may itself contain blanks and brackets.
    return stat.rpartition(")")[2].split()
