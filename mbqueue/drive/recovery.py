"""Rebuild the queue from manifests when its database is lost or damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from mbqueue import files
from mbqueue.clock import Clock, local_day, utc_text
from mbqueue.drive.moving import take_commits
from mbqueue.drive.notes import keep_note, merged, note_files, note_of, read_notes, steer_as_noted, write_note
from mbqueue.drive.rebuilding import enqueue_again, rebuild_queue, record_in, trained_by
from mbqueue.drive.reentry import Reentry
from mbqueue.errors import QueueDamaged, QueueError, QueueMoved, UsageError
from mbqueue.experiment import hash_of_spec, load_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.enqueueing import different_keys
from mbqueue.queue.jobs import Kind, SessionRow, State, told_apart_by
from mbqueue.queue.lost_work import lost_parts, lost_traces
from mbqueue.queue.opening import has_lost_content, require_no_cut_off_restore
from mbqueue.queue.sessions import may_be_at_work
from mbqueue.queue.sqlite import set_aside
from mbqueue.queue.store import Queue
from mbqueue.storage.commits import Commits, OnWrong, passed_over
from mbqueue.storage.manifest import Manifest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_folder, named_after

#: A message names at most this many keys of a spec.
_MOST_KEYS = 5


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The outcome of `recover`.

    Attributes:
        folds: (experiment, fold, number of finished epochs) of every fold in the new queue.
        replaced: the new path of the replaced database; None if no database was replaced.
    """

    folds: list[tuple[str, int, int]]
    replaced: Path | None


def recover(project: ProjectFolder, *, force: bool, note: Callable[[str], None], clock: Clock) -> Recovered:
    """Make a new queue from the manifests in the live folder and, for a project on a drive, on the mount.

    Every experiment is enqueued again, with its finished epochs, priorities, pauses and cancellations (see
    `read_notes`), even if it has no commit. Sessions repeat `predict` and `record` jobs, unless the files of these jobs
    are intact on the mount. If the live folder is lost, the pauses are lost too.

    If mbqueue can read the replaced queue, it also restores experiments and folds that exist only in that queue.
    Experiments enqueued after an earlier queue was lost may exist only in the replaced queue. If two experiments have
    the same name, mbqueue restores the one with checkpoints. If two experiments have the same name and no checkpoints,
    mbqueue restores the one in the note, not the one in the replaced queue. Before a file is set aside, ``note`` is
    called with the reason and the new path.

    If the project has a live folder, commits in state/ are first copied to the live folder. Sessions leave commits in
    state/ while the queue is on a server or the project is on a local disk.

    Raises:
        UsageError: if a session is using the queue; without ``force``, also if the queue is intact or a restore was
            interrupted.
        QueueError: if the project has no files to rebuild a queue from.
    """
    project.live_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(project.entering_lock, timeout=600):
        if not force:
            require_no_cut_off_restore(project)
        replaced = move_queue_aside(
            project, force=force, clock=clock, beforehand=lambda _project: _keep_notes(project, note)
        )
        take_commits(project.unsplit, project, differs=note)
        noted, trained = read_notes(project, note), _trained(project)
        asked = [one for one in noted if not _is_other(trained.get(one["spec"]["name"]), one)]

        def fill(queue: Queue) -> None:
            known = {(one.name, fold) for one in queue.experiments() for fold in one.spec["folds"]}
            for one in asked:
                enqueue_again(queue, one, now=clock.now(), by="recover", note=note)
            for folder in project.fold_dirs():
                if (folder.parent.name, named_after(folder).fold) not in known:
                    _restore_fold(project, queue, folder, note, clock.now())
            for one in asked:
                steer_as_noted(queue, one, now=clock.now())

        if project.topology.is_mirrored:
            reentry = Reentry(project, Drive(project.root), note=note, clock=clock)
            reentry.restore(from_snapshot=False, further=fill)
        else:
            rebuild_queue(project, fill)
        if project.queue_db.exists():
            overruled = {one["spec"]["name"] for one in noted if one not in asked}
            _leave_aside(project, {one["spec"]["name"] for one in asked}, overruled, note, clock.now())
    if not project.queue_db.exists():
        places = " or ".join(filter(None, [str(project.live_dir), project.topology.publishes_to]))
        before = f" The previous database is now {replaced}." if replaced is not None else ""
        raise QueueError(
            f"There is nothing to rebuild a queue from: no intact commit and no experiment in {places}.{before} "
            "Restore a backup (mbqueue restore FILE), or start over: mbqueue enqueue NAME"
        )
    found: list[tuple[str, int, int]] = []
    with Queue(project.queue_db, read_only=True) as queue:
        for experiment in queue.experiments():
            for fold in experiment.spec["folds"]:
                jobs = queue.jobs(experiment=experiment.name, fold=fold, state=State.COMMITTED)
                found.append((experiment.name, fold, sum(job.kind is Kind.TRAIN for job in jobs)))
    return Recovered(folds=found, replaced=replaced)


def move_queue_aside(
    project: ProjectFolder,
    *,
    force: bool,
    clock: Clock,
    beforehand: Callable[[ProjectFolder], None] = lambda _project: None,
) -> Path | None:
    """Move the queue aside; return its new path, or None if there was no queue.

    Args:
        beforehand: called just before the queue is moved. If ``beforehand`` raises an exception, the queue is not
            moved.

    Raises:
        UsageError: if the queue is intact and ``force`` is not given, or a session is using the queue.
        QueueError: if the queue cannot be checked: a newer mbqueue wrote it, it is locked, or its disk is not
            responding.
        QueueMoved: if the queue has moved to another database, and ``force`` is not given.
    """
    path, now = project.queue_db, clock.now()
    if not path.exists():
        return None
    sessions, is_whole = _looked_at(project, even_moved=force)
    if at_work := [row for row in sessions if may_be_at_work(row, now, path)]:
        first = at_work[0]
        raise UsageError(
            f"Session {first.id} (process {first.pid} on {first.host}) is using {path}. End it first: mbqueue stop. "
            "If it hangs or is suspended (Ctrl-Z), resume it or end it with kill -9."
        )
    if is_whole and not force:
        raise UsageError(f"The queue at {path} is intact. To replace it anyway, add --force.")
    beforehand(project)
    return set_aside(path, "replaced", now=now)


def _looked_at(project: ProjectFolder, *, even_moved: bool) -> tuple[tuple[SessionRow, ...], bool]:
    """Return the existing queue's sessions, as far as they are readable, and whether the queue is intact."""
    sessions: tuple[SessionRow, ...] = ()
    try:
        with Queue(project.queue_db, read_only=True) as queue:
            with suppress(QueueError):  # `verify` reports a damaged queue
                sessions = queue.sessions()
            queue.verify()
            return sessions, not (has_lost_content(project, queue) or lost_parts(project, queue))
    except QueueMoved:
        if not even_moved:
            raise
        return (), False
    except QueueDamaged:
        return sessions, False


def _keep_notes(project: ProjectFolder, note: Callable[[str], None]) -> None:
    """Write the notes of a queue before it is replaced, or report why this is not possible."""
    noted, trained = {one["spec"]["name"]: one for one in read_notes(project, lambda _text: None)}, _trained(project)
    try:
        with Queue(project.queue_db, read_only=True) as queue:
            queue.verify()  # copy nothing from a damaged queue
            found = [note_of(queue, experiment.name) for experiment in queue.experiments()]
    except QueueMoved:
        return
    except QueueError as error:
        note(f"Nothing was copied from the replaced queue: {error}")
        return
    for one in found:
        name = one["spec"]["name"]
        before = trained.get(name) or noted.get(name)
        if hash_of_spec(one["spec"]) != one["spec_hash"]:
            note(f"The spec of {name} in the replaced queue is damaged, so it was not used.")
        elif before is None:
            write_note(project.notes_dir, one)
        elif _is_other(before, one):
            note(
                f"{name} has different settings in the replaced queue than in its "
                f"{'checkpoints' if name in trained else 'note'} ({_differences(before, one)}). The replaced queue "
                f"is kept as {project.queue_db.name}.replaced-TIME next to the new one. To use its settings, "
                f"enqueue them under another name: mbqueue enqueue {name} --name {name}-2 --set KEY=VALUE"
            )
        elif not _is_other(noted.get(name), one):
            write_note(project.notes_dir, merged(noted.get(name, before), one))


def _trained(project: ProjectFolder) -> dict[str, dict[str, Any]]:
    """Read from manifests how each experiment was enqueued: name → record.

    If an experiment's manifests have different specs, the record is for the spec with the most finished epochs.
    """
    works: dict[str, dict[str, int]] = {}
    records: dict[str, dict[str, Any]] = {}
    for folder in project.fold_dirs():
        identity = named_after(folder)
        for spec_hash in {one.spec_hash for one in Commits(in_folder(folder), identity).manifests()}:
            newest = Commits(in_folder(folder), replace(identity, spec_hash=spec_hash)).newest()
            if newest is not None and (record := record_in(manifest := newest.manifest, str(folder))) is not None:
                done = works.setdefault(manifest.experiment, {})
                done[spec_hash] = done.get(spec_hash, 0) + manifest.epoch
                if done[spec_hash] == max(done.values()):
                    records[manifest.experiment] = {**record, "spec_hash": spec_hash}
    return records


def _is_other(before: Mapping[str, Any] | None, one: Mapping[str, Any]) -> bool:
    if before is None:
        return False
    return told_apart_by(before["spec"], before["spec_hash"]) != told_apart_by(one["spec"], one["spec_hash"])


def _differences(before: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    return ", ".join(different_keys(before["spec"], one["spec"])[:_MOST_KEYS]) or "the search or the trial's number"


def _leave_aside(
    project: ProjectFolder, asked: set[str], overruled: set[str], note: Callable[[str], None], now: float
) -> None:
    """Set aside and report each file with work that is missing from the new queue; then update the notes.

    Args:
        asked: names of experiments whose notes were used.
        overruled: names of experiments whose commits have a different spec than their notes.
    """
    aside = files.unused(project.live_dir / f"aside-{utc_text(now).replace(':', '')}")

    def take(path: Path, why: str) -> None:
        target = aside / path.relative_to(project.live_dir)
        note(f"{path} was moved to {target}, because {why}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    for path in note_files(project):
        if path.stem not in asked:
            is_of_others = path.stem in overruled
            take(path, "its settings differ from those of the checkpoints" if is_of_others else "it is damaged")
    with Queue(project.queue_db) as queue:
        known = {experiment.name: experiment for experiment in queue.experiments()}
        for trace, lost in lost_traces(project, queue):
            path = Path(trace.path)
            if lost.ahead and lost.fold is not None:
                identity = known[trace.experiment].identity(lost.fold)
                OwnCommits(in_folder(path), identity, _set_aside_in(trace.path, note)).newest()
            elif lost.is_of_other_spec:
                take(path, f"{trace.experiment} was restored with different settings")
            else:
                take(path, f"{trace.experiment} could not be enqueued from it")
        for name in known:
            keep_note(project, queue, name)


def _set_aside_in(where: str, note: Callable[[str], None]) -> OnWrong:
    return lambda base, why: note(f"{where}/{base} is renamed to {base}.damaged: {why}")


def _restore_fold(project: ProjectFolder, queue: Queue, folder: Path, note: Callable[[str], None], now: float) -> None:
    found = _commits_of(queue, folder, note).newest()
    if found is None:
        return
    newest = found.manifest
    folds = {one.name: one.spec["folds"] for one in queue.experiments()}.get(newest.experiment, [])
    if newest.fold in folds:
        pass  # a note or the mount has already restored this fold to the queue
    elif (record := record_in(newest, str(folder))) is not None:
        enqueue_again(queue, record, now=now, by="recover", note=note)
    elif not _enqueue_from_file(project, queue, newest, now):
        note(
            f"Skipped {folder}: its manifests do not contain the spec of {newest.experiment}, and no file in "
            f"{project.jobs_dir} matches the spec's hash."
        )
        return
    experiment = queue.experiment(newest.experiment)
    if newest.fold not in experiment.spec["folds"]:
        note(f"Skipped {folder}: {experiment.name} was enqueued without fold {newest.fold}.")
        return
    if newest.enqueued and newest.enqueued["prepare"]:
        prepare = newest.enqueued["prepare"]
        queue.adopt_result(experiment.name, Kind.PREPARE, result=prepare, source="a manifest", now=now, by="recover")
    queue.adopt(trained_by(experiment, newest.fold, newest), now=now, by="recover")


def _commits_of(queue: Queue, folder: Path, note: Callable[[str], None]) -> Commits:
    """Make a reader that accepts only commits of the fold that the folder is named after."""
    identity = named_after(folder)
    known = next((one for one in queue.experiments() if one.name == identity.experiment), None)
    if known is not None:
        identity = known.identity(identity.fold)
    return Commits(in_folder(folder), identity, passed_over(str(folder), note))


def _enqueue_from_file(project: ProjectFolder, queue: Queue, manifest: Manifest, now: float) -> bool:
    """Enqueue an experiment from its file in jobs/, for an older manifest that does not record how it was enqueued.

    Returns:
        Whether the file exists and has the same spec as the manifest.
    """
    try:
        spec = load_spec(project.experiment_file(manifest.experiment))
    except UsageError:
        return False
    if spec.hash != manifest.spec_hash:
        return False
    results_dir = project.results_folder(local_day(now), spec.folder_name)
    queue.enqueue(spec, results_dir=results_dir, now=now, by="recover")
    return True
