"""Record your requests for each experiment in a note, a file next to the queue.

The note records how the experiment was enqueued, whether the experiment or a fold is paused or cancelled, and the
priorities. Every command that changes a pause, cancellation or priority updates the note. `mbqueue recover` restores
requests from the notes, because commits do not contain them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.drive.outcomes import enqueued_record
from mbqueue.drive.reading import NOT_OURS, what_is_wrong
from mbqueue.drive.snapshots import check_enqueued
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue

FORMAT = 1
LARGEST = 1 << 20
_OVER = {State.COMMITTED, State.SKIPPED, State.CANCELLED}


def keep_note(project: ProjectFolder, queue: Queue, name: str) -> None:
    """Copy the user's requests for an experiment from the queue to the experiment's note."""
    write_note(project.notes_dir, note_of(queue, name))


def note_of(queue: Queue, name: str) -> dict[str, Any]:
    """Make an experiment's note: the user's requests (pauses, cancellations, priorities) in the queue."""
    experiment, jobs = queue.experiment(name), queue.jobs(experiment=name)
    folds = {}
    for fold in experiment.spec["folds"]:
        of_fold = [job for job in jobs if job.fold == fold]
        folds[str(fold)] = {
            "paused": any(job.paused for job in of_fold),
            "priority": max(job.priority for job in of_fold),
            "cancelled": any(job.state is State.CANCELLED for job in of_fold)
            and all(job.state in _OVER for job in of_fold),
        }
    record = [job.state for job in jobs if job.kind is Kind.RECORD]
    return {
        "format": FORMAT,
        **enqueued_record(experiment),
        "spec_hash": experiment.spec_hash,
        "paused": experiment.paused,
        "cancelled": record == [State.CANCELLED],
        "folds": folds,
    }


def merged(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two queues' notes of one experiment: all of ``first``, and the folds that only ``later`` contains."""
    folds = dict(later["folds"]) | dict(first.get("folds", {}))
    adds = sorted(set(folds) - set(first.get("folds", folds)))
    is_over = first.get("cancelled", later["cancelled"])
    spec = first["spec"] | {"folds": sorted({*first["spec"]["folds"], *later["spec"]["folds"]})}
    # If folds were added after the cancellation, only the earlier folds stay cancelled, not the whole experiment.
    return {**later, **first, "spec": spec, "folds": folds, "cancelled": is_over and not adds}


def write_note(folder: Path, content: Mapping[str, Any]) -> None:
    """Write an experiment's note to its file, unless the file already has this content."""
    text = files.json_bytes({**content, "checksum": files.sha256_of_json(content)})
    path = folder / f"{content['spec']['name']}.json"
    with suppress(OSError):  # if the file is missing or cannot be read, write it again
        if path.read_bytes() == text:
            return
    files.write_bytes(path, text)


def note_files(project: ProjectFolder) -> list[Path]:
    """The files of all notes, without temporary files."""
    return [path for path in project.notes_dir.glob("*.json") if not path.name.startswith(files.TEMP_PREFIX)]


def read_notes(project: ProjectFolder, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Read all notes, earliest experiment first. Damaged files are skipped and reported to ``note``."""
    found = []
    for path in note_files(project):
        try:
            found.append(_read(path))
        except (OSError, *NOT_OURS) as error:
            why = what_is_wrong(error)
            note(f"{path} is skipped: it is not a valid note of an experiment ({why}).")
    return sorted(found, key=lambda one: (one["enqueued_at"], one["spec"]["name"]))


def steer_as_noted(queue: Queue, one: Mapping[str, Any], *, now: float) -> None:
    """Restore an experiment's pauses, cancellations and priorities, once the queue contains all its finished work."""
    name = one["spec"]["name"]
    found = {experiment.name: experiment for experiment in queue.experiments()}
    if name not in found or found[name].spec_hash != one["spec_hash"]:
        return
    if one["paused"]:
        queue.pause(name, now=now, by="recover")
    if one["cancelled"]:
        queue.cancel(name, now=now, by="recover")
        return
    for fold in found[name].spec["folds"]:
        asked = one["folds"].get(str(fold))
        if asked is None:
            continue
        if asked["priority"] != found[name].priority:
            queue.set_priority(name, asked["priority"], now=now, fold=fold, by="recover")
        if asked["paused"] != one["paused"]:
            (queue.pause if asked["paused"] else queue.resume)(name, now=now, fold=fold, by="recover")
        if asked["cancelled"]:
            queue.cancel(name, now=now, fold=fold, by="recover")


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError("it is larger than any note that mbqueue writes")
    parts: dict[str, Any] = json.loads(content)
    if parts.pop("checksum") != files.sha256_of_json(parts):
        raise ValueError("its checksum is wrong")
    if parts["format"] > FORMAT:
        raise ValueError("a newer mbqueue wrote it")
    check_enqueued(parts, source=str(path))
    for asked in parts["folds"].values():
        if not (isinstance(asked["priority"], int) and isinstance(asked["paused"], bool)):
            raise TypeError("a fold has an invalid value of priority or paused")
    if parts["spec"]["name"] != path.stem:
        raise ValueError("it belongs to another experiment")
    return parts
