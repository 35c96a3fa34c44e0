"""Refuse a copy of a project (`cp -r`) that shares only the queue or only the store with its original.

The copied project's sessions would retrain or overwrite the original's work. A copy that shares both the queue and the
store counts as another machine of the same project. This module does not check projects on a drive, because a session
must start even while the drive hangs. For these projects, `mbqueue.belonging` distinguishes the live folders.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import UsageError
from mbqueue.project import ProjectFolder


def require_original(project: ProjectFolder) -> None:
    """Refuse a copy that shares only the queue or only the store with its original. Record the folder of an original.

    Nothing is recorded for projects on a drive, or for projects that have both a queue server and a store, or neither.
    If the original no longer exists, the project was moved, not copied. Copies on another machine are not detected.

    Raises:
        UsageError: if the project is a copy that shares only the queue or only the store with its original.
    """
    topology = project.topology
    if not (shared := topology.shared_by_copies):
        return
    key = files.sha256_of_json([topology.queue_url, topology.store])[:16]
    here = {"host": socket.gethostname(), "root": str(project.root), "shares": key}
    known = _read(project.home_file)
    if known == here:
        return
    if known and (known["host"], known["shares"]) == (here["host"], key):
        original = Path(known["root"])
        if _are_two(project.home_file, original / project.home_file.relative_to(project.root)):
            raise UsageError(
                f"{project.root} is a copy of {original}, and both would use the same {shared}. Change "
                f"`{'store' if topology.store else 'queue'}` in the copy's mbqueue.toml. If you want to keep only "
                "the copy, remove the original."
            )
    files.write_json(project.home_file, here)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_bytes())
        return {key: str(known[key]) for key in ("host", "root", "shares")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _are_two(one: Path, other: Path) -> bool:
    """Whether two existing paths are different files. A bind mount can give one file two paths."""
    try:
        return one.stat().st_ino != other.stat().st_ino
    except OSError:
        return False
