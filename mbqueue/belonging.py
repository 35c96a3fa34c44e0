"""Match live folders with their projects on a drive, and find them even while the drive is not mounted.

An empty mount point, a wrong folder at the project's path, and a new project of the same name all look like a project
that has lost everything. A project on a drive therefore gets an id when a live folder first publishes to the project.
The id is part of a file's name, and mbqueue never changes this file. If two machines publish to a project for the first
time at the same moment, they create two ids, and each machine checks the id that it created.

The live folder's path depends on mbqueue.toml or on the project's resolved path, so mbqueue cannot find the path while
the drive is not mounted. Each machine therefore also records the path next to the default live folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from mbqueue import files
from mbqueue.mounts import mount_of

#: The file in a live folder that records its project.
BELONGING_FILE = "project.json"
#: Seconds between checks for a stop request in `answer_within`.
_NOTICE_SECONDS = 0.1
_ID = re.compile(r"[0-9a-f]{16}")
_ID_FILE = re.compile(r"project-([0-9a-f]{16})\.json")

Answer = TypeVar("Answer")


def id_file(project_id: str) -> str:
    """The name of the file in a project's state folder that records an id."""
    return f"project-{project_id}.json"


def ids_in(state: Path) -> list[str]:
    """The ids in a project's state folder, sorted; empty until a live folder has published to it."""
    return sorted(match[1] for path in state.iterdir() if (match := _ID_FILE.fullmatch(path.name)))


@dataclass(frozen=True, kw_only=True)
class Belonging:
    """A live folder's record of its project.

    Attributes:
        root: the project's folder when it was last seen.
        id: the project's id; None until something is published.
    """

    root: str
    id: str | None = None

    @classmethod
    def of(cls, live: Path) -> Belonging | None:
        """Read the record in a live folder; None if the record is missing or damaged."""
        try:
            parts = json.loads((live / BELONGING_FILE).read_bytes())
            root, project_id = parts["root"], parts["id"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        is_id = project_id is None or (isinstance(project_id, str) and _ID.fullmatch(project_id))
        return cls(root=root, id=project_id) if isinstance(root, str) and is_id else None

    def keep(self, live: Path) -> None:
        """Write the record to a live folder, unless the folder already has the same record."""
        if Belonging.of(live) != self:
            files.write_json(live / BELONGING_FILE, asdict(self))

    def missing(self, state: Path) -> str | None:
        """Explain why a state folder does not belong to this project; None if it may belong to the project.

        Raises:
            OSError: if the drive cannot be read.
        """
        if self.id is None or (state / id_file(self.id)).exists():
            return None
        if not ids_in(state) and mount_of(state).is_remote:
            return None  # a drive that has just been remounted may not show the id yet
        return f"{state.parent} is not the project's folder"


def default_live_dir(root: Path, resolved: str) -> Path:
    """The live folder of the project at ``root`` if the user does not choose one.

    Args:
        resolved: the path of ``root`` with symbolic links resolved.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # The key depends only on the path, so that every session on this machine finds the same queue.
    key = hashlib.sha256(resolved.encode()).hexdigest()[:16]
    return caches / "mbqueue" / "live" / f"{root.name}-{key}"


def note_live_dir(root: Path, live: Path) -> None:
    """Record a project's live folder on this machine, unless it is the default live folder."""
    if live in {default_live_dir(root, str(root)), _noted_live_dir(root)}:
        return
    with suppress(OSError):  # the home folder may be read-only; only `status` needs this note, while the drive is away
        files.make_folder(_note_of(root).parent)
        files.write_json(_note_of(root), {"root": str(root), "live": str(live)})


def live_dir_of(root: Path, given: str | None) -> Path | None:
    """Find the live folder of the project at ``root`` without accessing the drive.

    Returns:
        The first of the given, default and recorded folders that contains this project's record, or None.
    """
    for live in (Path(given or "").expanduser(), default_live_dir(root, str(root)), _noted_live_dir(root) or Path()):
        belonging = Belonging.of(live) if live.is_absolute() else None
        if belonging is not None and belonging.root == str(root):
            return live
    return None


def _noted_live_dir(root: Path) -> Path | None:
    try:
        return Path(json.loads(_note_of(root).read_bytes())["live"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _note_of(root: Path) -> Path:
    default = default_live_dir(root, str(root))
    return default.with_name(f"{default.name}.json")


def answer_within(
    seconds: float, ask: Callable[[], Answer], *, should_stop: Callable[[], bool] = lambda: False
) -> Answer:
    """Call ``ask`` in a thread, and return its result or raise its error.

    If ``ask`` does not return in time, its thread keeps running, because Python cannot stop a thread.

    Raises:
        TimeoutError: if the call takes longer than ``seconds``.
        InterruptedError: if ``should_stop`` returned True while waiting.
    """
    end = time.monotonic() + seconds
    answers: queue.SimpleQueue[tuple[Answer] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(),))
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            answers.put(error)

    threading.Thread(target=run, name="mbqueue-look", daemon=True).start()
    while True:
        try:
            answer = answers.get(timeout=max(0.0, min(_NOTICE_SECONDS, end - time.monotonic())))
        except queue.Empty:
            if should_stop():
                raise InterruptedError("a request to stop ended the wait") from None
            if time.monotonic() >= end:
                raise TimeoutError(f"it did not answer within {seconds:.0f} s") from None
        else:
            break
    if isinstance(answer, BaseException):
        raise answer
    return answer[0]
