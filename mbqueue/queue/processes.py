"""Which process this is, told apart from every other one on this machine, and whether such a process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """One process.

    Attributes:
        boot_id: the boot of the machine and the process namespace, in which alone `pid` means something; None
            where the system does not tell.
        pid_started: start of the process in clock ticks since boot, which tells it from a later one with its pid.
    """

    host: str
    boot_id: str | None
    pid: int
    pid_started: int | None


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    return identity_of(os.getpid())


def identity_of(pid: int) -> ProcessIdentity:
    """The identity of the process that has this pid now, on this machine."""
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
    """Whether the process certainly lives no more. Without proof (another machine, boot or container): False."""
    if identity.boot_id is None or identity.boot_id != boot_id():
        return False
    if not Path(f"/proc/{identity.pid}").exists():
        return True
    started = _started(identity.pid)
    return started is None or (identity.pid_started is not None and started != identity.pid_started)


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone or a zombie, or there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the program's name, is in brackets and may itself hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])
