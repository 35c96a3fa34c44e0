"""Find work that is recorded in a project's files but missing from the queue, because an earlier queue was lost.

Every command runs this check when it opens the queue (`mbqueue.queue.opening`). To be fast, the check lists file names,
and reads only the notes and the beginning of one manifest per fold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mbqueue.errors import CheckpointError, QueueError, counted
from mbqueue.files import TEMP_PREFIX, sha256_of_json
from mbqueue.project import ProjectFolder, fold_named
from mbqueue.queue.jobs import Experiment
from mbqueue.queue.store import Queue
from mbqueue.storage.manifest import HEAD_BYTES, identity_in_head, manifest_of
from mbqueue.storage.names import newest_plain_manifest

#: Messages name at most this many lost parts.
_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a note, or a fold's newest commit, records about an experiment.

    Attributes:
        path: the note, or the folder of the fold.
        fold: the fold; None for a note that cannot be read.
        spec_hash: the hash of the spec; None if unknown.
        epochs: the number of finished epochs, from the name of the newest commit; 0 for a note.
        manifest: the manifest of the newest commit; None for a note.
    """

    path: str
    experiment: str
    fold: int | None
    spec_hash: str | None
    epochs: int = 0
    manifest: str | None = None


@dataclass(frozen=True, kw_only=True)
class LostPart:
    """A part of an experiment that is missing from the queue.

    Attributes:
        fold: the missing fold, or None if the whole experiment is missing.
        is_of_other_spec: whether the queue has an experiment with the same name and a different spec.
        is_of_known_search: whether a search in the queue would reuse the experiment's name for a new trial.
        ahead: how many finished epochs the queue does not count as done.
    """

    experiment: str
    fold: int | None = None
    is_of_other_spec: bool = False
    is_of_known_search: bool = False
    ahead: int = 0

    @property
    def is_overwritten_by_work(self) -> bool:
        """Whether a session would set the lost commits aside, replace the lost note, or train lost epochs again."""
        return self.is_of_other_spec or self.is_of_known_search or self.ahead > 0

    def concerns(self, name: str) -> bool:
        """Whether the lost part belongs to the experiment or search with the given name."""
        return name in (self.experiment, self.experiment.rpartition(".")[0])


def traces(project: ProjectFolder) -> list[Trace]:
    """Find the experiments' notes and commits in the live folder."""
    found: list[Trace] = []
    for note in _entries(project.notes_dir):
        if note.name.endswith(".json") and not note.name.startswith(TEMP_PREFIX):
            found += _of_note(note)
    for experiment in _entries(project.all_checkpoints):
        for folder in _entries(experiment):
            if (fold := fold_named(folder.name)) is not None:
                found += _of_commits(experiment.name, fold, folder)
    return found


def lost_traces(project: ProjectFolder, queue: Queue) -> list[tuple[Trace, LostPart]]:
    """Find the notes and commits of lost work, each with the part that is missing from the queue."""
    # List the files before reading the queue: a new experiment enters the queue before its first file is written.
    found = traces(project)
    if not found:
        return []
    known = {experiment.name: experiment for experiment in queue.experiments()}
    done = queue.finished_epochs() if any(trace.epochs > 1 for trace in found) else {}
    return [
        (trace, lost)
        for trace in found
        if (lost := _lost_of(trace, known, done)) is not None and not (lost.is_of_other_spec and _is_damaged(trace))
    ]


def lost_parts(project: ProjectFolder, queue: Queue) -> list[LostPart]:
    """Find the parts of experiments that exist in the project's files but not in the queue."""
    lost = {lost for _, lost in lost_traces(project, queue)}
    if not lost or _is_in_file(project, queue, lost):
        return []
    return sorted(lost, key=lambda one: (one.experiment, -1 if one.fold is None else one.fold, one.ahead))


def _lost_of(trace: Trace, known: Mapping[str, Experiment], done: Mapping[tuple[str, int], int]) -> LostPart | None:
    experiment = known.get(trace.experiment)
    if experiment is None:
        search = trace.experiment.rpartition(".")[0]
        searches = {(one.spec.get("trial") or {}).get("search", {}).get("name") for one in known.values()}
        return LostPart(experiment=trace.experiment, is_of_known_search=search in searches)
    if trace.spec_hash not in (None, experiment.spec_hash):
        return LostPart(experiment=trace.experiment, is_of_other_spec=True)
    if trace.fold is None or experiment.is_released:
        return None
    if trace.fold not in experiment.spec["folds"]:
        return LostPart(experiment=trace.experiment, fold=trace.fold)
    # The files may be one epoch ahead of the queue, because a session publishes a commit just before the queue counts
    # the epoch as done.
    ahead = trace.epochs - done.get((trace.experiment, trace.fold), 0)
    return LostPart(experiment=trace.experiment, fold=trace.fold, ahead=ahead) if ahead > 1 else None


def described(lost: Sequence[LostPart]) -> str:
    """List the lost parts as text that completes the sentence "The queue lacks …"."""
    folds: dict[str, list[int]] = {}
    for one in lost:
        if one.fold is not None and not one.ahead:
            folds.setdefault(one.experiment, []).append(one.fold)
    told = dict.fromkeys(_part(one, folds) for one in lost)
    shown = list(told)[:_NAMED]
    more = len(told) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _part(one: LostPart, folds: dict[str, list[int]]) -> str:
    if one.is_of_other_spec:
        return f"{one.experiment} with its previous settings"
    if one.ahead:
        return f"{counted(one.ahead, 'finished epoch')} of {one.experiment} fold {one.fold}"
    if one.fold is None:
        return one.experiment
    numbers = folds[one.experiment]
    return f"{one.experiment} fold{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _is_in_file(project: ProjectFolder, queue: Queue, lost: Iterable[LostPart]) -> bool:
    """Whether the project's SQLite file still contains the experiments that a queue on a server has lost."""
    if queue.database.file is not None or not project.queue_db.exists():
        return False
    with suppress(QueueError), Queue(project.queue_db, read_only=True) as old:  # the old queue is damaged or was moved
        return {one.experiment for one in lost} <= {experiment.name for experiment in old.experiments()}
    return False


def _entries(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _of_note(note: os.DirEntry[str]) -> list[Trace]:
    experiment = note.name.removesuffix(".json")
    try:
        with open(note, "rb") as stream:  # noqa: PTH123 - a project may have a thousand, and a Path takes half the time
            content = json.loads(stream.read())
        if content.pop("checksum") != sha256_of_json(content):
            raise ValueError("the checksum of this note is wrong")  # noqa: TRY301 - as any other damage
        spec_hash = str(content["spec_hash"])
        return [
            Trace(path=note.path, experiment=experiment, fold=int(fold), spec_hash=spec_hash)
            for fold in content["spec"]["folds"]
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [Trace(path=note.path, experiment=experiment, fold=None, spec_hash=None)]


def _of_commits(experiment: str, fold: int, folder: os.DirEntry[str]) -> list[Trace]:
    newest = newest_plain_manifest(entry.name for entry in _entries(folder))
    if newest is None:
        return []
    manifest = f"{folder.path}/{newest.name}"
    try:
        with open(manifest, "rb", buffering=0) as stream:  # noqa: PTH123 - as above
            identity = identity_in_head(stream.read(HEAD_BYTES))
    except OSError:
        identity = None
    if identity is None:
        return [Trace(path=folder.path, experiment=experiment, fold=fold, spec_hash=None)]
    if (identity.experiment, identity.fold) != (experiment, fold):
        return []  # someone moved another fold's commits here; the fold's next session reports them
    return [
        Trace(
            path=folder.path,
            experiment=experiment,
            fold=fold,
            spec_hash=identity.spec_hash,
            epochs=newest.finished_epochs,
            manifest=manifest,
        )
    ]


def _is_damaged(trace: Trace) -> bool:
    """Whether the manifest in ``trace`` is damaged. A session will set the damaged manifest aside."""
    if trace.manifest is None:
        return False
    try:
        manifest_of(Path(trace.manifest).read_bytes(), source=trace.manifest)
    except (OSError, CheckpointError):
        return True
    return False
