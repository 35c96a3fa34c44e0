"""To which project on a drive a live folder belongs, and where it is, so that both are known while the drive is away.

An empty mount point, another folder in its place, and a project of the same name that somebody has just made there all
look like a project that has lost everything. So a project on a drive gets an id when a live folder first publishes:
a file whose name holds it, and that is never changed. Two machines that do so at once leave two of them; each
looks for its own.

Where a project's live folder is stands in mbqueue.toml, which lies on the drive, or follows from what its path leads
to, which the drive must be asked for. So that is noted on the machine, beside the default live folders.
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

#: The file of a live folder that says it.
BELONGING_FILE = "project.json"
#: How long a wait may take to notice a wish to stop.
_NOTICE_SECONDS = 0.1
_ID = re.compile(r"[0-9a-f]{16}")
_ID_FILE = re.compile(r"project-([0-9a-f]{16})\.json")

Answer = TypeVar("Answer")


def id_file(project_id: str) -> str:
    """The name of the file in a project's state folder that holds an id."""
    return f"project-{project_id}.json"


def ids_in(state: Path) -> list[str]:
    """The ids in a project's state folder, sorted; none while no live folder has published to it."""
    return sorted(match[1] for path in state.iterdir() if (match := _ID_FILE.fullmatch(path.name)))


@dataclass(frozen=True, kw_only=True)
class Belonging:
    """What a live folder knows of its project.

    Attributes:
        root: the project's folder when it was last there.
        id: of the project; None until something is published.
    """

    root: str
    id: str | None = None

    @classmethod
    def of(cls, live: Path) -> Belonging | None:
        """What stands in a live folder; None when nothing does, or it is damaged."""
        try:
            parts = json.loads((live / BELONGING_FILE).read_bytes())
            root, project_id = parts["root"], parts["id"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        is_id = project_id is None or (isinstance(project_id, str) and _ID.fullmatch(project_id))
        return cls(root=root, id=project_id) if isinstance(root, str) and is_id else None

    def keep(self, live: Path) -> None:
        """Write it down in a live folder; nothing when it stands there."""
        if Belonging.of(live) != self:
            files.write_json(live / BELONGING_FILE, asdict(self))

    def missing(self, state: Path) -> str | None:
        """Why a state folder is not that of this project, or None when it is, as far as can be told.

        Raises:
            OSError: when the mount fails.
        """
        if self.id is None or (state / id_file(self.id)).exists():
            return None
        if not ids_in(state) and mount_of(state).is_remote:
            return None  # a drive that was mounted anew may not have uploaded the id
        return f"what lies at {state.parent} is another folder than the project"


def default_live_dir(root: Path, resolved: str) -> Path:
    """The live folder of the project at ``root``, which links lead to as ``resolved``, unless another is given."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Stable for one project, so that a second session on this machine finds the first one's queue.
    key = hashlib.sha256(resolved.encode()).hexdigest()[:16]
    return caches / "mbqueue" / "live" / f"{root.name}-{key}"


def note_live_dir(root: Path, live: Path) -> None:
    """Note on this machine where the live folder of the project at ``root`` is, unless it would be looked for there."""
    if live in {default_live_dir(root, str(root)), _noted_live_dir(root)}:
        return
    with suppress(OSError):  # a home that cannot be written: then only status does not find it while the drive is away
        files.make_folder(_note_of(root).parent)
        files.write_json(_note_of(root), {"root": str(root), "live": str(live)})


def live_dir_of(root: Path, given: str | None) -> Path | None:
    """The live folder that is known to be of the project at ``root``: the one given, the default, or that was noted.

    Asks nothing of the drive.
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
    """What ``ask`` returns or raises; whoever asks a mount that hangs is left behind in a thread.

    Raises:
        TimeoutError: when it takes longer.
        InterruptedError: when it is not waited for, because somebody wishes to stop.
    """
    end = time.monotonic() + seconds
    answers: queue.SimpleQueue[tuple[Answer] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(),))
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answers.put(error)

    threading.Thread(target=run, name="mbqueue-look", daemon=True).start()
    while True:
        try:
            answer = answers.get(timeout=max(0.0, min(_NOTICE_SECONDS, end - time.monotonic())))
        except queue.Empty:
            if should_stop():
                raise InterruptedError("it is not waited for: somebody wishes to stop") from None
            if time.monotonic() >= end:
                raise TimeoutError(f"it has not answered for {seconds:.0f} s") from None
        else:
            break
    if isinstance(answer, BaseException):
        raise answer
    return answer[0]
