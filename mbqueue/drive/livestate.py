"""Record what a live folder has published to the drive, and summarise it for `mbqueue status`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mbqueue import files
from mbqueue.belonging import Belonging, id_file, ids_in, note_live_dir
from mbqueue.clock import SystemClock
from mbqueue.errors import MbqueueError, UsageError
from mbqueue.project import PUBLISHED_ID, ProjectFolder, find_project
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Manifest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import in_folder, named_after

FORMAT = 1
#: Seconds to wait for the lock. No write to a local disk takes this long.
_LOCK_SECONDS = 60.0


@dataclass(kw_only=True)
class LiveState:
    """The content of publishing.json in a live folder.

    Attributes:
        database: id of the live database, for the names of its snapshots.
        number: number of the database's last snapshot, or of the snapshot that the database started from.
        ancestry: id of each earlier database → number of the snapshot that the next database started from.
        last_event: id of the last event in the published queue.
        commits: "EXPERIMENT/fold_i" → stem and seconds of training of the newest commit on the mount.
        published_at: when all committed work was last on the mount, as a Unix timestamp.
        trouble: why some work is not published, and since when; None if publishing is working.
        aside: published commits that are not part of their fold's accepted training run.
        damaged: path of a damaged file on the mount → reason.
        others: session, host, device and folds of each live session that uses another database.
    """

    database: str = field(default_factory=lambda: secrets.token_hex(4))
    number: int = 0
    ancestry: dict[str, int] = field(default_factory=dict)
    last_event: int = 0
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    published_at: float | None = None
    trouble: dict[str, Any] | None = None
    aside: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    @classmethod
    def load(cls, path: Path) -> LiveState:
        """Load the state from a file. If the file is missing or damaged, the next round publishes everything again."""
        try:
            parts = json.loads(path.read_bytes())
            return cls(**{key: parts[key] for key in cls.__dataclass_fields__ if key in parts})
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Write the state to a file durably."""
        files.write_json(path, asdict(self))

    @classmethod
    @contextmanager
    def changing(cls, path: Path) -> Iterator[LiveState]:
        """Yield the current state, locked against other writers, and save it after the block if it changed.

        The file has several writers: a session's main thread, its publishing thread and other sessions on this machine.
        Each writer must therefore reread the state before changing it.

        Raises:
            OSError: if another process holds the lock for too long.
        """
        lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise OSError(f"{path} is locked by another process, which is hanging or suspended.") from error
        try:
            state = cls.load(path)
            before = asdict(state)
            yield state
            if asdict(state) != before or not path.exists():
                state.save(path)
        finally:
            lock.release()


def publishing_status(project: ProjectFolder) -> dict[str, Any] | None:
    """Report what is committed, what is published, and what would be lost if this machine died now.

    The result is None for a project that does not publish its work. With an object store, no folds are listed: nothing
    is at risk, because each commit is in the store before the queue counts it. Keys:

        mount            the project's folder, or the address of the store
        state            "published", "behind" or "degraded" (with why and since)
        why, since       the reason for trouble with that place, and when it began, or null
        published_at     when everything was last published
        folds[]          experiment, fold, committed, published (stems), seconds_at_risk (of training)
        others[]         live sessions with other databases: session, host, device, folds
        aside[]          published commits that are not part of their fold's accepted training
        damaged          path of a damaged file on the mount → reason
    """
    mount = project.topology.publishes_to
    if not mount:
        return None
    if project.topology.store:
        state, fold_dirs = LiveState(trouble=store_trouble(project) or None), list[Path]()
    else:
        state, fold_dirs = LiveState.load(project.publishing_file), project.fold_dirs()
        if project.away is not None and state.trouble is None:
            state.trouble = {"why": f"{project.root}: {project.away}", "since": SystemClock().now()}
    folds = []
    for folder in fold_dirs:
        newest = Commits(in_folder(folder), named_after(folder)).newest_manifest()
        if newest is None:
            continue
        there = state.commits.get(f"{folder.parent.name}/{folder.name}", {"stem": None, "seconds": 0.0})
        folds.append(
            {
                "experiment": newest.experiment,
                "fold": newest.fold,
                "committed": newest.stem,
                "published": there["stem"],
                "seconds_at_risk": max(0.0, trained_seconds(newest) - there["seconds"]),
            }
        )
    current = all(fold["committed"] == fold["published"] for fold in folds)
    return {
        "mount": mount,
        "state": "degraded" if state.trouble else "published" if current else "behind",
        "why": state.trouble and state.trouble["why"],
        "since": state.trouble and state.trouble["since"],
        "published_at": state.published_at,
        "folds": folds,
        "others": state.others,
        "aside": state.aside,
        "damaged": state.damaged,
    }


def store_trouble(project: ProjectFolder) -> dict[str, Any]:
    """Return why this machine's commits are not reaching the store, and since when; an empty dict if they are."""
    try:
        content = json.loads(project.store_file.read_bytes())
        return content if isinstance(content, dict) and isinstance(content.get("since"), float | int) else {}
    except (OSError, ValueError):
        return {}


def remember_root(project: ProjectFolder) -> None:
    """Record which project the live folder belongs to, for commands that run while the drive is not mounted.

    Raises:
        UsageError: if the live folder belongs to the project that this project was copied from.
    """
    before = Belonging.of(project.live_dir)
    if before is not None and before.root != str(project.root) and _is_elsewhere(before, project):
        raise UsageError(
            f"The live folder {project.live_dir} belongs to {before.root}; {project.root} is a copy of that project. "
            "Give the copy a different live folder: live_dir in its mbqueue.toml, or --live-dir"
        )
    Belonging(root=str(project.root), id=before.id if before is not None else None).keep(project.live_dir)
    note_live_dir(project.root, project.live_dir)


def _is_elsewhere(belonging: Belonging, project: ProjectFolder) -> bool:
    """Whether a project in another folder still uses this live folder."""
    root = Path(belonging.root)
    try:
        if belonging.id is None or not (root / PUBLISHED_ID / id_file(belonging.id)).exists():
            return False
        # A live folder that was copied with its project belongs to the copy.
        return not root.samefile(project.root) and find_project(root).live_dir.samefile(project.live_dir)
    except (OSError, MbqueueError):
        return False


def agree_on_project(project: ProjectFolder, drive: Drive) -> None:
    """Check that the live folder belongs to the project on the mount; if the project has no id, create one.

    Raises:
        OSError: if the folder belongs to another project, or the mount fails.
    """
    known = Belonging.of(project.live_dir) or Belonging(root=str(project.root))
    drive.belonging = known
    drive.check()
    if known.id is None:
        known = replace(known, id=next(iter(ids_in(project.state_dir)), None) or secrets.token_hex(8))
    assert known.id is not None
    if not (project.state_dir / id_file(known.id)).exists():
        drive.belonging = None  # the mount has no id to compare with yet
        content = json.dumps({"id": known.id}).encode()
        drive.write_new(f"{PUBLISHED_ID}/{id_file(known.id)}", content)
    known.keep(project.live_dir)
    drive.belonging = known


def as_published(manifest: Manifest) -> dict[str, Any]:
    """Make a fold's entry in `LiveState.commits` from the manifest of its newest commit on the mount."""
    return {"stem": manifest.stem, "seconds": trained_seconds(manifest)}


def trained_seconds(manifest: Manifest) -> float:
    """The seconds of training from the start of a fold to a commit."""
    rows = manifest.history[:-1] if manifest.complete else manifest.history
    return float(sum(row.get("seconds", 0.0) for row in rows)) + manifest.epoch_seconds
