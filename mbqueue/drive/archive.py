"""Back up the state of a project to one archive, and restore it (`mbqueue backup` and `mbqueue restore`).

The archive is a tar file with queue.db (a snapshot), checkpoints/, results/, jobs/, mbqueue.toml, and finally
checksums.json with the size and SHA-256 of every other file. Sessions may run during a backup. The snapshot is taken
before the commits are read, so the commits are never behind the snapshot. A restore also adopts progress that is in the
commits but not in the snapshot. The archive contains no caches, because sessions recreate them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from mbqueue import __version__, files
from mbqueue.clock import Clock, utc_text
from mbqueue.drive.notes import note_of, write_note
from mbqueue.drive.rebuilding import trained_by
from mbqueue.drive.recovery import move_queue_aside
from mbqueue.drive.snapshots import check, take
from mbqueue.errors import MbqueueError, QueueError, QueueLost, SpecError, UsageError
from mbqueue.project import FOLD_PATTERN, ProjectFolder, fold_name
from mbqueue.queue.lost_work import lost_parts, traces
from mbqueue.queue.opening import RESTORING, cut_off_restore
from mbqueue.queue.sqlite import settle
from mbqueue.queue.store import Queue
from mbqueue.settings import SETTINGS_FILE, load_settings
from mbqueue.storage.blobs import Folder
from mbqueue.storage.commits import Commits, passed_over
from mbqueue.storage.manifest import Damaged
from mbqueue.storage.names import CHECKPOINT, MANIFEST, newest_plain_manifest
from mbqueue.storage.places import in_folder, named_after

FORMAT = 1
CHECKSUMS = "checksums.json"
LARGEST_MEMBER = 2 << 30
MOST_MEMBERS = 100_000
_TRIES = 5

_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}"
_MEMBER = re.compile(
    rf"queue\.db|mbqueue\.toml|jobs/{_PART}\.toml|results(?:/{_PART}){{1,8}}"
    rf"|checkpoints/{_PART}/{FOLD_PATTERN}/{_PART}\.(?:{CHECKPOINT}|{MANIFEST})"
)


class DamagedArchive(MbqueueError):
    """The archive does not match what `mbqueue backup` wrote. Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """The number of files, bytes and commits in an archive."""

    files: int
    size: int
    commits: int


def back_up(project: ProjectFolder, target: Path, *, clock: Clock) -> Backup:
    """Write an archive to ``target``, which appears only after the archive has passed the checks of `restore`.

    Raises:
        UsageError: if there is no queue, or ``target`` exists.
        QueueError, DamagedSnapshot, DamagedArchive: if the database is damaged, or the archive fails its check. Nothing
            is written to ``target``.
    """
    if not project.queue_db.exists():
        raise UsageError(f"There is no queue at {project.queue_db}, so there is nothing to back up.")
    if target.exists():
        raise UsageError(f"{target} already exists. Choose a different name, or remove this file first.")
    snapshot = project.live_dir / f"{files.TEMP_PREFIX}backup.db"
    checksums: dict[str, dict[str, object]] = {}
    try:
        take(project.queue_db, snapshot)
        check(snapshot)  # `restore` refuses a snapshot that fails this check
        with files.replacing(target) as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                for name, content in _contents(project, snapshot):
                    checksums[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                    _add(archive, name, content)
                listing = {"format": FORMAT, "mbqueue": __version__, "files": checksums}
                _add(archive, CHECKSUMS, json.dumps({**listing, "made_at": utc_text(clock.now())}, indent=1).encode())
            stream.flush()
            found = _unpack(Path(stream.name), lambda _name, _content: None)
    finally:
        snapshot.unlink(missing_ok=True)
    return found


def restore(project: ProjectFolder, source: Path, *, force: bool, note: Callable[[str], None], clock: Clock) -> Backup:
    """Replace the project's state with the state in an archive, after checking the whole archive.

    The replaced state is kept next to the new one (state/replaced-TIME, queue.db.replaced-TIME). If the archived
    mbqueue.toml would run different commands than the project's mbqueue.toml, mbqueue saves the archived file as
    mbqueue.toml.restored and calls ``note``.

    Raises:
        DamagedArchive: if the archive differs from what `back_up` wrote. Nothing is changed.
        UsageError: if there is a queue and ``force`` is not given, or a session is using the queue.
        QueueLost: if all or part of the queue was lost, and ``force`` is not given.
        QueueError: if mbqueue cannot check whether a session is using the queue.
    """
    if not source.is_file():
        raise UsageError(f"There is no file {source}.")
    if not force:
        _require_nothing_lost(project)
    project.live_dir.mkdir(parents=True, exist_ok=True)
    staging = project.live_dir / f"{files.TEMP_PREFIX}restore"
    shutil.rmtree(staging, ignore_errors=True)
    with FileLock(project.entering_lock, timeout=600):
        try:
            found = _unpack(source, lambda name, content: files.write_bytes(staging / name, content))
            check(staging / "queue.db")
            for folder in (staging / "checkpoints").glob(f"*/{FOLD_PATTERN}"):
                _require_whole(folder, source)
            now = clock.now()
            with Queue(staging / "queue.db") as queue:
                queue.end_all_sessions(reason="the queue was restored from a backup", now=now, by="restore")
                for experiment in queue.experiments():
                    # Once a pruned trial's checkpoints are removed, only its spec contains its histories.
                    for fold in () if experiment.is_released else experiment.spec["folds"]:
                        folder = staging / "checkpoints" / experiment.name / fold_name(fold)
                        commits = Commits(in_folder(folder), experiment.identity(fold), passed_over(str(folder), note))
                        newest = commits.newest()
                        trained = trained_by(experiment, fold, None if newest is None else newest.manifest)
                        queue.adopt(trained, now=now, by="restore")
            settle(staging / "queue.db")
            with _said_to_be_restored(project, source):
                move_queue_aside(project, force=force, clock=clock)
                _put_in_place(project, staging, clock, note)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return found


def _require_nothing_lost(project: ProjectFolder) -> None:
    """Raise an error if the restore would replace work that `recover` can still rebuild."""
    if cut_off_restore(project) is not None:
        return
    is_lost = bool(traces(project))
    if project.queue_db.exists():
        try:
            with Queue(project.queue_db, read_only=True) as queue:
                is_lost = bool(lost_parts(project, queue))
        except QueueError:
            return  # `move_queue_aside` checks the queue again
    if is_lost:
        raise QueueLost(
            f"{project.live_dir} contains checkpoints or notes of experiments, but their queue was lost. Nothing was "
            "changed. To bring them back, run: mbqueue recover. To use the archive instead, add --force; mbqueue then "
            "sets these files aside."
        )


def _require_whole(folder: Path, source: Path) -> None:
    """Check that every commit in a folder is intact, and belongs to the fold that the folder is named after."""

    def refuse(stem: str, why: str) -> None:
        raise DamagedArchive(f"{source}: the commit {stem} is damaged: {why} Nothing was changed.")

    commits = Commits(in_folder(folder), named_after(folder), refuse)
    for commit in commits.commits():
        try:
            commits.checkpoint(commit)
        except Damaged as error:
            refuse(commit.base, str(error))


@contextmanager
def _said_to_be_restored(project: ProjectFolder, source: Path) -> Iterator[None]:
    """Mark the project as being restored, with a file in the live folder.

    If a restore is interrupted, commands that find no queue ask you to run the restore again.
    """
    said = project.live_dir / RESTORING
    files.write_text(said, shlex.quote(str(source.absolute())))
    try:
        yield
    finally:
        if project.queue_db.exists():
            said.unlink()


def _contents(project: ProjectFolder, snapshot: Path) -> Iterator[tuple[str, bytes]]:
    content = snapshot.read_bytes()
    snapshot.unlink()  # remove the snapshot now, so that a crash cannot leave it behind
    yield "queue.db", content
    for folder in project.fold_dirs():
        for file, content in _commits(folder).items():
            yield f"checkpoints/{folder.parent.name}/{folder.name}/{file}", content
    seen = set()
    for base in dict.fromkeys((project.working_results("results"), project.results_dir)):
        for path in sorted(base.rglob("*")):
            name = str(PurePosixPath("results", *path.relative_to(base).parts))
            if name not in seen and _MEMBER.fullmatch(name) and path.is_file() and not path.is_symlink():
                seen.add(name)
                try:
                    yield name, path.read_bytes()
                except FileNotFoundError:
                    continue  # a session is replacing this file, so only the next backup will contain it
    for path in sorted(project.jobs_dir.glob("*.toml")):
        if _MEMBER.fullmatch(f"jobs/{path.name}"):
            yield f"jobs/{path.name}", path.read_bytes()
    if (project.root / SETTINGS_FILE).exists():
        yield SETTINGS_FILE, (project.root / SETTINGS_FILE).read_bytes()


def _commits(folder: Path) -> dict[str, bytes]:
    """Read a fold's newest commit and the commit of its best epoch, both from the same moment."""
    wrong: dict[str, str] = {}
    commits = Commits(place := in_folder(folder), named_after(folder), wrong.__setitem__)
    for _ in range(_TRIES):
        newest, chain = newest_plain_manifest(Folder(folder).listed("")), commits.chain()
        if (newest and newest.stem) == (chain[-1][0].base if chain else None):
            return {
                name: content
                for commit, checkpoint in chain
                for name, content in ((place.checkpoint(commit), checkpoint), (place.manifest(commit), commit.content))
            }
        # Try again: a session may have committed during the read.
    raise QueueError(
        f"The newest commit in {folder} cannot be backed up: {' '.join(wrong.values())} The next session that trains "
        "this fold sets the damaged commit aside."
    )


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def _unpack(source: Path, lay: Callable[[str, bytes], None]) -> Backup:
    """Check an archive, and pass the name and content of each file to ``lay``."""
    try:
        with tarfile.open(source, mode="r:") as archive:
            return _lay_out(archive, source, lay)
    except (tarfile.TarError, ValueError, TypeError, KeyError, AttributeError, EOFError, RecursionError) as error:
        raise DamagedArchive(f"{source} is not a complete backup: {error}. Nothing was changed.") from error


def _lay_out(archive: tarfile.TarFile, source: Path, lay: Callable[[str, bytes], None]) -> Backup:
    laid: dict[str, tuple[int, str]] = {}
    listing = None
    for count, member in enumerate(archive):
        wrong = None
        if count >= MOST_MEMBERS or listing is not None:
            wrong = f"it contains too many files, or files after {CHECKSUMS}"
        elif member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.issparse() or member.name in laid:
            wrong = f"{member.name!r:.200} is not a regular file, or occurs twice"
        elif member.name != CHECKSUMS and not _MEMBER.fullmatch(member.name):
            wrong = f"{member.name!r:.200} does not belong in a backup"
        elif member.size > LARGEST_MEMBER:
            wrong = f"{member.name} is too large"
        elif member.size > source.stat().st_size - member.offset_data:
            wrong = f"it is cut off in the middle of {member.name}; copy it again"
        if wrong:
            raise DamagedArchive(f"{source} is not a complete backup: {wrong}. Nothing was changed.")
        stream = archive.extractfile(member)
        assert stream is not None
        content = stream.read()
        if member.name == CHECKSUMS:
            listing = json.loads(content)
            continue
        laid[member.name] = (len(content), hashlib.sha256(content).hexdigest())
        lay(member.name, content)
    if listing is None or "queue.db" not in laid:
        raise DamagedArchive(
            f"{source} is not a complete backup: it ends too early; copy it again. Nothing was changed."
        )
    if listing["format"] > FORMAT:
        raise DamagedArchive(f"{source} was made by a newer mbqueue ({listing['mbqueue']}). Nothing was changed.")
    said = {name: (checksum["size"], checksum["sha256"]) for name, checksum in listing["files"].items()}
    if said != laid:
        raise DamagedArchive(f"{source} is damaged: its files do not match its checksums. Nothing was changed.")
    commits = sum(name.startswith("checkpoints/") and name.endswith(MANIFEST) for name in laid)
    return Backup(files=len(laid), size=source.stat().st_size, commits=commits)


def _put_in_place(project: ProjectFolder, staging: Path, clock: Clock, note: Callable[[str], None]) -> None:
    replaced = files.unused(project.live_dir / f"replaced-{utc_text(clock.now()).replace(':', '')}")

    def put(path: Path, target: Path, name: str) -> None:
        if target.exists():
            (replaced / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(target, replaced / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)

    (staging / "checkpoints").mkdir(exist_ok=True)
    put(staging / "checkpoints", project.all_checkpoints, "checkpoints")
    results = project.working_results("results")
    for path in sorted((staging / "results").rglob("*")):
        if path.is_file():
            name = str(path.relative_to(staging / "results"))
            put(path, results / name, f"results/{name}")
    for path in sorted((staging / "jobs").glob("*")):
        put(path, project.jobs_dir / path.name, f"jobs/{path.name}")
    if (staging / SETTINGS_FILE).exists():
        asked, settings = _told_to_run(staging), project.root / SETTINGS_FILE
        if asked is None or (any(asked) and asked != _told_to_run(project.root)):
            settings = settings.with_name(f"{SETTINGS_FILE}.restored")
            note(
                f"The archive's settings cannot be read, or would run commands or call a webhook that {project.root} "
                f"does not use. mbqueue saved them as {settings} without using them. Open that file, and copy the "
                "settings that you want."
            )
        # mbqueue.toml must exist at all times, because it may name the live folder.
        if settings.exists():
            replaced.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(settings, replaced / settings.name)
        files.write_bytes(settings, (staging / SETTINGS_FILE).read_bytes())
    notes = staging / project.notes_dir.name
    notes.mkdir()
    with Queue(staging / "queue.db", read_only=True) as queue:
        for experiment in queue.experiments():
            write_note(notes, note_of(queue, experiment.name))
    put(notes, project.notes_dir, notes.name)
    # Put the queue in place last, so that you can simply repeat an interrupted restore.
    (staging / "queue.db").replace(project.queue_db)
    files.fsync_dir(project.live_dir)


def _told_to_run(folder: Path) -> tuple[str, str, str] | None:
    """Return the commands and the webhook in a folder's settings; None if the settings cannot be read."""
    try:
        settings = load_settings(folder)
    except (SpecError, OSError):
        return None
    return settings.end_command, settings.notify.command, settings.notify.webhook
