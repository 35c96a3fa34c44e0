"""Publish result files to the mount. Readers verify result files against a listing next to the checkpoints.

Result files have fixed names (preds_fold_0.csv), so they are the only files on a mount that may be replaced. A listing
is written once, under a unique name, and contains the size and hash of every file. If a result file matches no listing,
mbqueue recreates it from the checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mbqueue import files
from mbqueue.drive.reading import NOT_OURS, Listings
from mbqueue.drive.snapshots import check_enqueued
from mbqueue.project import FOLD_PATTERN, PUBLISHED_OUTCOMES, fold_name
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.jobs import Experiment, Job, Kind, State, history_row
from mbqueue.results.record import RESULTS_FILE, recorded_names
from mbqueue.results.tables import fold_files
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import HASH_DIGITS, hashed_name
from mbqueue.storage.results import ResultFile
from mbqueue.task import N_FOLDS

FORMAT = 1


def enqueued_record(experiment: Experiment, jobs: Iterable[Job] = ()) -> dict[str, Any]:
    """Make a record for manifests and listings, from which an experiment can be enqueued again.

    Args:
        jobs: the experiment's jobs. The result of its `prepare` job becomes part of the record.
    """
    return {
        "spec": experiment.spec,
        "results_dir": experiment.results_dir,
        "priority": experiment.priority,
        "enqueued_at": experiment.enqueued_at,
        "prepare": next((job.result for job in jobs if job.kind is Kind.PREPARE), None),
    }


def why_pruned(jobs: Sequence[Job]) -> dict[str, str]:
    """Return the entry ``pruned``, with the reason for pruning; return an empty dict if the trial was not pruned.

    Snapshots and listings contain the entry ``pruned``, because commits do not record pruning.
    """
    record = next(job for job in jobs if job.kind is Kind.RECORD)
    is_pruned = record.state is State.SKIPPED and record.changed_why.startswith(PRUNED)
    return {"pruned": record.changed_why} if is_pruned else {}


@dataclass(frozen=True, kw_only=True)
class ResultListing:
    """The record of a finished `prepare`, `predict` or `record` job: its result, and the files that it wrote.

    Attributes:
        chain: hash of the training histories that the results are based on; empty for `prepare`.
        enqueued: see `enqueued_record`.
    """

    kind: str
    experiment: str
    spec_hash: str
    fold: int | None
    chain: str
    result: dict[str, Any]
    files: list[ResultFile]
    enqueued: dict[str, Any]
    format: int = FORMAT

    @property
    def stem(self) -> str:
        return self.kind if self.fold is None else fold_name(self.fold)

    def is_another_in_the_folder_of(self, experiment: Experiment) -> bool:
        """Whether the listing belongs to an experiment with the same results folder but different settings.

        Two machines that cannot see each other's work may start trials with the same name and different settings.
        """
        return self.spec_hash != experiment.spec_hash and self.enqueued["results_dir"] == experiment.results_dir


def chain_of(job: Job, histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Return a hash of the training histories that a job's results are based on; empty for a `prepare` job.

    The results of a `record` job are based on the histories of all folds.
    """
    if job.kind is Kind.PREPARE:
        return ""
    folds = sorted(histories) if job.fold is None else [job.fold]
    return files.sha256_of_json({str(fold): list(histories[fold]) for fold in folds})


def histories_of(jobs: Sequence[Job]) -> dict[int, list[dict[str, Any]]]:
    """The history rows of each fold's committed epochs, by fold, from the jobs of one experiment."""
    found: dict[int, list[dict[str, Any]]] = {job.fold: [] for job in jobs if job.fold is not None}
    for job in jobs:
        if job.kind is Kind.TRAIN and job.state is State.COMMITTED and job.result is not None:
            assert job.fold is not None
            found[job.fold].append(history_row(job.result))
    return found


class PublishedResults:
    """The listings and result files of a project on a mount.

    Args:
        on_damaged: called once with the path and the reason for each damaged file.
    """

    def __init__(self, drive: Drive, on_damaged: Callable[[str, str], None] = lambda _path, _why: None) -> None:
        self._drive = drive
        self._listings = Listings(drive, f"prepare|record|{FOLD_PATTERN}", _outcome, on_damaged)
        self._seen: dict[str, tuple[tuple[int, int], str]] = {}

    def listed(self, experiment: str) -> list[ResultListing]:
        """Every intact listing of an experiment."""
        found = self._listings.listed(f"{PUBLISHED_OUTCOMES}/{experiment}")
        return [found[base] for base in sorted(found, key=lambda base: base[-HASH_DIGITS:])]

    def publish(self, outcome: ResultListing, folder: Path) -> None:
        """Copy a job's files from a local folder to the project's results, and then write their listing."""
        for file in outcome.files:
            self._drive.replace(f"{outcome.enqueued['results_dir']}/{file.name}", file.written_in(folder))
        content = files.json_bytes(asdict(outcome))
        self._drive.put(f"{PUBLISHED_OUTCOMES}/{outcome.experiment}/{hashed_name(outcome.stem, content)}.json", content)

    def are_whole(self, results_dir: str, listed: Sequence[ResultFile]) -> bool:
        """Whether the result files on the mount still match the listing; another session may have replaced files.

        A file is read again only if its size or modification time has changed since the last call.
        """
        for file in listed:
            path = f"{results_dir}/{file.name}"
            try:
                signature = self._drive.signature(path)
                if self._seen.get(path) != (signature, file.sha256):
                    file.read(self._drive, path)
                    self._seen[path] = (signature, file.sha256)
            except FileNotFoundError:
                return False
        return True

    def fetch(self, outcome: ResultListing, folder: Path) -> bool:
        """Copy a job's files into a local folder. If a file is damaged, return False without copying anything."""
        contents = {}
        for file in outcome.files:
            path = f"{outcome.enqueued['results_dir']}/{file.name}"
            try:
                contents[file.name] = file.read(self._drive, path)
            except FileNotFoundError as error:
                self._listings.tell(path, error.strerror or str(error))
                return False
        for name, content in contents.items():
            files.write_bytes(folder / name, content)
        return True


def _outcome(parts: Any, path: str) -> ResultListing:
    if parts["format"] > FORMAT:
        raise ValueError("a newer mbqueue wrote it; update mbqueue")
    given = {key: parts[key] for key in ResultListing.__dataclass_fields__}
    outcome = ResultListing(**given | {"files": [ResultFile(*file) for file in given["files"]]})
    check_enqueued(outcome.enqueued, source=path)
    if outcome.kind not in {Kind.PREPARE, Kind.PREDICT, Kind.RECORD} or not isinstance(outcome.result, dict):
        raise ValueError("it names an unknown kind of job")
    if (outcome.fold is not None) != (outcome.kind == Kind.PREDICT) or outcome.fold not in (None, *range(N_FOLDS)):
        raise ValueError("its fold number is invalid")
    experiment = PurePosixPath(path).parent.name
    if not (outcome.enqueued["spec"]["name"] == outcome.experiment == experiment):
        raise ValueError(f"it belongs to {outcome.experiment!r:.100}, not to {experiment}")
    for file in outcome.files:
        if not (file.is_safe and isinstance(file.sha256, str)):
            raise ValueError(f"it lists an invalid file, {file.name!r:.100}")
    return outcome


def result_files(folder: Path, job: Job, spec: Mapping[str, Any]) -> list[ResultFile] | None:
    """A job's result files; None if a file is missing, or `results.json` is damaged."""
    try:
        if job.fold is not None:
            paths = fold_files(folder, job.fold, spec)
        else:
            content = json.loads((folder / RESULTS_FILE).read_bytes())
            paths = [folder / name for name in recorded_names(content)]
        return [ResultFile.of(path) for path in paths]
    except (FileNotFoundError, *NOT_OURS):
        return None
