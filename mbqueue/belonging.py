"""Match live folders with their projects on a drive, and find them even while the drive is not mounted.

An empty mount point, a wrong folder at the project's path, and a new project of the same name all look like a project
that has lost everything. So a project on a drive gets an id when a live folder first publishes: a file that is named
after the id and never changes. If two machines publish for the first time at once, they create two ids, and each
machine checks its own.

Finding the live folder's path needs the drive: the path is in mbqueue.toml or derived from the project's resolved path.
So each machine also records the path, beside the default live folders.
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
#: How often a wait checks for a request to stop.
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
        """The record in a live folder; None if the record is missing or damaged."""
        try:
            parts = json.loads((live / BELONGING_FILE).read_bytes())
            root, project_id = parts["root"], parts["id"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        is_id = project_id is None or (isinstance(project_id, str) and _ID.fullmatch(project_id))
        return cls(root=root, id=project_id) if isinstance(root, str) and is_id else None

    def keep(self, live: Path) -> None:
        """Write the record to a live folder, unless the folder has this record already."""
        if Belonging.of(live) != self:
            files.write_json(live / BELONGING_FILE, asdict(self))

    def missing(self, state: Path) -> str | None:
        """Why a state folder does not belong to this project; None if there is no contradiction.

        Raises:
            OSError: if the mount fails.
        """
        if self.id is None or (state / id_file(self.id)).exists():
            return None
        if not ids_in(state) and mount_of(state).is_remote:
            return None  # a drive that was mounted again may not have uploaded the id
        return f"{state.parent} is not the project's folder"


def default_live_dir(root: Path, resolved: str) -> Path:
    """The default live folder of the project at ``root``, which resolves to ``resolved``, unless the user gave another
    folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Stable for a project, so that a second session on this machine finds the first one's queue.
    key = hashlib.sha256(resolved.encode()).hexdigest()[:16]
    return caches / "mbqueue" / "live" / f"{root.name}-{key}"


def note_live_dir(root: Path, live: Path) -> None:
    """Record on this machine the live folder of the project at ``root``, unless it is the default."""
    if live in {default_live_dir(root, str(root)), _noted_live_dir(root)}:
        return
    with suppress(OSError):  # the home folder is not writable: only `status` without the drive needs this note
        files.make_folder(_note_of(root).parent)
        files.write_json(_note_of(root), {"root": str(root), "live": str(live)})


def live_dir_of(root: Path, given: str | None) -> Path | None:
    """The live folder known to belong to the project at ``root``: the given, default or recorded folder.

    Finding this folder does not access the drive.
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
    """Call ``ask`` in a thread, and return its result or raise its error. If the call hangs on a mount, the thread
    keeps running.

    Raises:
        TimeoutError: if the call takes too long.
        InterruptedError: if a request to stop ends the wait.
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
                raise InterruptedError("the wait was ended by a request to stop") from None
            if time.monotonic() >= end:
                raise TimeoutError(f"it did not answer within {seconds:.0f} s") from None
        else:
            break
    if isinstance(answer, BaseException):
        raise answer
    return answer[0]
