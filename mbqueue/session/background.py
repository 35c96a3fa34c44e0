"""Start, find and stop sessions in the background. This module does not import torch.

``state/background.json`` records the process by its pid, start time and boot id, so mbqueue never signals a later
process with the same pid. The JSON file also records the project's folder, because a copied project contains the file
too. A session counts as running only if its process has this project's queue open.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mbqueue import files
from mbqueue.clock import Clock, utc_text
from mbqueue.errors import SessionError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import SessionRow
from mbqueue.queue.opening import is_queue_there, open_queue, require_queue
from mbqueue.queue.processes import ProcessIdentity, identity_of, is_gone, is_known_dead, parent_of, this_process
from mbqueue.session.options import WorkOptions

#: How long a new session may take to register in the queue. Importing torch from a cold disk is slow.
START_SECONDS = 90.0
_POLL_SECONDS = 0.1
_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class BackgroundSession:
    """One background session, or several that were started together, one per device.

    Attributes:
        process: the session's process; with several sessions, the process that started them.
        sessions: ids of the sessions that have registered in the queue.
        started_at: when the session was started, as a Unix timestamp.
    """

    process: ProcessIdentity
    log: Path
    sessions: tuple[str, ...]
    started_at: float

    @property
    def session(self) -> str | None:
        """Id of the first session; None until a session has registered in the queue."""
        return self.sessions[0] if self.sessions else None

    @property
    def is_running(self) -> bool:
        """Whether the session's process is alive, as far as this machine can tell."""
        return self.process.boot_id == this_process().boot_id and not is_known_dead(self.process)


@dataclass(frozen=True, kw_only=True)
class StoppedSession:
    """The outcome of a request to stop a session.

    Attributes:
        session: the session's id; None if the session had not registered in the queue yet.
        reason: why the session ended; None if the session is still running.
        is_refused: whether the request failed because the process belongs to another user.
    """

    session: str | None
    pid: int
    reason: str | None
    is_refused: bool = False


def start(project: ProjectFolder, options: WorkOptions, *, clock: Clock) -> BackgroundSession:
    """Start ``mbqueue work`` as a process that outlives this one; return once it is running.

    Raises:
        UsageError: if a background session of this project is already running.
        SessionError: if the process ended before its session started; the message includes the end of its log.
    """
    require_queue(project)
    project.logs_dir.mkdir(parents=True, exist_ok=True)
    with _starting_alone(project):
        running = current(project)
        if running is not None and running.is_running:
            raise UsageError(
                f"A session is already running in the background ({', '.join(running.sessions) or 'starting'}, process "
                f"{running.process.pid}). Follow its log with: mbqueue logs -f. Stop it with: mbqueue stop"
            )
        before = {row.id for row in _sessions(project)}
        now = clock.now()
        stamp = utc_text(now).replace("-", "").replace(":", "")
        log = project.logs_dir / f"work-{stamp}-{os.getpid()}.log"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", "mbqueue", "--project", str(project.root), "work", *options.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # the session outlives the terminal or notebook cell
            )
        started = BackgroundSession(process=identity_of(child.pid), log=log, sessions=(), started_at=now)
        _write(project, started)
        # This process may live long (for example, a notebook's kernel), so reap the child when it ends.
        threading.Thread(target=child.wait, name="mbqueue-background", daemon=True).start()
        started = _wait_until_at_work(project, started, child, len(options.devices or [""]), before, clock)
        _write(project, started)
    return started


def current(project: ProjectFolder) -> BackgroundSession | None:
    """The latest background session, running or not; None if no session has been started in the background.

    A ``background.json`` that was copied from another folder is ignored.
    """
    try:
        content = json.loads(project.background_file.read_text(encoding="utf-8"))
        if not _is_of_this_folder(content, project):
            return None
        return BackgroundSession(
            process=ProcessIdentity(**content["process"]),
            log=project.logs_dir / content["log"],
            sessions=tuple(content["sessions"]),
            started_at=content["started_at"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # treat a damaged file as missing, because the queue lists sessions too


def came_with_a_copy(project: ProjectFolder) -> bool:
    """Whether the latest background session belongs to the folder from which this folder was copied or moved."""
    try:
        return not _is_of_this_folder(json.loads(project.background_file.read_bytes()), project)
    except (OSError, ValueError, AttributeError):
        return False


def stop(
    project: ProjectFolder, *, wait_seconds: float, clock: Clock, session: str | None = None
) -> list[StoppedSession]:
    """Ask this project's sessions on this machine to save their work and stop; wait until their processes have ended.

    Args:
        session: id of one session; None for all.

    Returns:
        One entry per session; empty if none of the requested sessions is running on this machine.
    """
    found = [(identity, one) for identity, one in _running_here(project) if session is None or one == session]
    # If several sessions share a parent process, the parent also receives the request and forwards it. The result does
    # not include the parent.
    parents = {parent_of(identity.pid) for identity, session in found if session is not None}
    refused = {identity for identity, _ in found if not _is_asked(identity)}
    asked = [identity for identity, _ in found if identity not in refused]
    deadline = clock.monotonic() + wait_seconds
    while any(not is_known_dead(identity) for identity in asked) and clock.monotonic() < deadline:
        clock.sleep(_POLL_SECONDS)
    return [
        StoppedSession(
            session=session,
            pid=identity.pid,
            reason=_reason(project, session) if is_known_dead(identity) else None,
            is_refused=identity in refused,
        )
        for identity, session in found
        if session is not None or identity.pid not in parents
    ]


def newest_log(project: ProjectFolder) -> Path:
    """The path of the latest background session's log.

    Raises:
        UsageError: if no background session has written a log.
    """
    logs = sorted(project.logs_dir.glob("work-*.log"))
    if not logs:
        raise UsageError(
            f"There is no log in {project.logs_dir}: no session was started in the background. Start one with: "
            "mbqueue work --background"
        )
    return logs[-1]


def follow(project: ProjectFolder, *, lines: int, keep_on: bool, clock: Clock) -> Iterator[str]:
    """Yield the last lines of the newest log; with ``keep_on``, also new lines until the session ends."""
    log = newest_log(project)
    with log.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        yield from stream.readlines()[-lines:]
        while keep_on:
            session = current(project)
            is_over = session is None or session.log != log or not session.is_running
            # Read the log once more after the session has ended, so that the last lines are not lost.
            yield from stream.readlines()
            if is_over:
                return
            clock.sleep(_POLL_SECONDS)


@contextmanager
def _starting_alone(project: ProjectFolder) -> Iterator[None]:
    """Refuse to start a background session while another one is starting."""
    try:
        with FileLock(project.background_file.with_suffix(".lock"), timeout=0):
            yield
    except Timeout as error:
        raise UsageError("A session is starting in the background. See its log with: mbqueue logs") from error


def _wait_until_at_work(
    project: ProjectFolder,
    started: BackgroundSession,
    child: subprocess.Popen[bytes],
    sessions: int,
    before: Collection[str],
    clock: Clock,
) -> BackgroundSession:
    deadline = clock.monotonic() + START_SECONDS
    found: tuple[str, ...] = ()
    while clock.monotonic() < deadline:
        code = child.poll()
        found = tuple(row.id for row in _unended(project) if _belongs(row, started.process))
        # A session that failed to start on its device no longer has a child process, so do not wait for this session.
        if found and (len(found) == sessions or len(found) >= len(_children(child.pid))):
            break
        if code is not None:
            return _ended_early(project, started, code, before)
        clock.sleep(_POLL_SECONDS)
    return replace(started, sessions=found)


def _ended_early(
    project: ProjectFolder, started: BackgroundSession, code: int, before: Collection[str]
) -> BackgroundSession:
    """Find the sessions that both started and ended since the last check; raise an error if there are none.

    Start times cannot identify earlier sessions, because a queue's server may have a different clock.
    """
    here = this_process()
    # The parent of an ended process is unknown, so compare only the host and the boot id.
    done = tuple(
        row.id
        for row in _sessions(project)
        if row.id not in before and (row.host, row.boot_id) == (here.host, here.boot_id)
    )
    if done:
        return replace(started, sessions=done)
    said = "".join(f"  {line}" for line in started.log.read_text(errors="replace").splitlines(True)[-_TAIL_LINES:])
    raise SessionError(f"The background process exited with code {code} before its session began. Its log:\n{said}")


def _belongs(row: SessionRow, process: ProcessIdentity) -> bool:
    """Whether a session belongs to the given process or to one of its children."""
    if row.identity == process:
        return True
    return row.boot_id == process.boot_id and not is_known_dead(row.identity) and parent_of(row.pid) == process.pid


def _is_asked(identity: ProcessIdentity) -> bool:
    """Ask a process to stop; return False if it belongs to another user."""
    try:
        os.kill(identity.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []


def _running_here(project: ProjectFolder) -> Iterator[tuple[ProcessIdentity, str | None]]:
    """Yield (process, session id) for each session of this project that runs in a different process on this machine."""
    here = this_process()
    file = None if project.topology.queue_url else project.queue_db
    found = {row.identity: row.id for row in _unended(project) if not is_gone(row.identity, file)}
    background = current(project)
    sessions: dict[ProcessIdentity, str | None] = {**found}
    if background is not None:
        at_work = set(background.sessions) & set(found.values())
        sessions.setdefault(background.process, None if at_work else background.session)
    for identity, session in sessions.items():
        if identity.boot_id == here.boot_id and identity.pid != here.pid and not is_known_dead(identity):
            yield identity, session


def _is_of_this_folder(content: Mapping[str, Any], project: ProjectFolder) -> bool:
    """Whether a session of this folder wrote the file.

    Also True for files of early versions, which recorded no folder.
    """
    return bool(content.get("folder", _folder_id(project)) == _folder_id(project))


def _folder_id(project: ProjectFolder) -> list[int]:
    """The device and inode of the live folder, which are the same for all paths to the folder, but not for a copy."""
    there = project.live_dir.stat()
    return [there.st_dev, there.st_ino]


def _sessions(project: ProjectFolder) -> tuple[SessionRow, ...]:
    if not is_queue_there(project):
        return ()
    with open_queue(project, read_only=True) as queue:
        return queue.sessions()


def _unended(project: ProjectFolder) -> list[SessionRow]:
    return [row for row in _sessions(project) if row.ended_at is None]


def _reason(project: ProjectFolder, session: str | None) -> str:
    if session is None:
        return "the session was still starting"
    with open_queue(project, read_only=True) as queue:
        return queue.session(session).end_reason or "its process died without a report; the next session resumes"


def _write(project: ProjectFolder, session: BackgroundSession) -> None:
    content = {**asdict(session), "log": session.log.name, "folder": _folder_id(project)}
    files.write_json(project.background_file, content)
