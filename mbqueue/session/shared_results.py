"""Share the result files of jobs with other machines through the object store. This module does not import torch.

The queue lists a job's files, with sizes and hashes, in the job's result. The transaction that commits the job also
commits the list of its files, so machines never have to merge lists. The session sends the files to the store before it
commits the job. A file's name in the store contains the file's hash, so the file never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import ResultsError
from mbqueue.project import STORED_RESULTS, ProjectFolder
from mbqueue.queue.jobs import Experiment, Job, Kind, State, history_row
from mbqueue.queue.store import Queue
from mbqueue.results.record import RESULTS_FILE, recorded_names
from mbqueue.results.tables import history_file, write_history
from mbqueue.session.record_inputs import written_checksums
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.results import ResultFile


def send_results(store: ObjectStore, experiment: str, folder: Path, results: Iterable[ResultFile]) -> None:
    """Send a job's result files to the store; call this function before the job is committed."""
    there = store.names(f"{STORED_RESULTS}/{experiment}")
    for file in results:
        if file.stored_name not in there:
            store.put(_path(experiment, file), file.written_in(folder))


def send_local_results(project: ProjectFolder, queue: Queue, store: ObjectStore) -> None:
    """Send a new store the result files of all folds that this machine has already predicted."""
    for experiment in queue.experiments():
        folder = project.working_results(experiment.results_dir)
        for checksums in written_checksums(queue.jobs(experiment=experiment.name, state=State.COMMITTED)).values():
            whole = [file for file in ResultFile.all_in(checksums) if file.is_whole(folder / file.name)]
            if whole:
                send_results(store, experiment.name, folder, whole)


def recorded_checksums(folder: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that the `record` job wrote, by file name."""
    of_results = ResultFile.of(folder / RESULTS_FILE).checksum
    return {name: content["run"]["files"].get(name, of_results) for name in recorded_names(content)}


def fetch_results(store: ObjectStore, experiment: Experiment, jobs: Iterable[Job], folder: Path) -> None:
    """Copy the files of committed jobs from the store to ``folder``, except those that are already there.

    For folds that are still being trained, write the histories from the rows that the queue stores.

    Raises:
        ResultsError: if a file is missing from the store, or differs from the file that was sent.
    """
    done = [job for job in jobs if job.state is State.COMMITTED and job.result is not None]
    predicted = {job.fold for job in done if job.kind is Kind.PREDICT}
    rows: dict[int, list[dict[str, Any]]] = {}
    listed: dict[str, ResultFile] = {}
    for job in done:
        assert job.result is not None
        listed |= {file.name: file for file in ResultFile.all_in(job.result.get("files", {}))}
        if job.kind is Kind.TRAIN and job.fold is not None and job.fold not in predicted:
            rows.setdefault(job.fold, []).append(history_row(job.result))
    lost = {name: file for name, file in listed.items() if not file.is_whole(folder / name)}
    is_recorded = any(job.kind is Kind.RECORD for job in done)
    if not is_recorded or (lost and RESULTS_FILE in listed):
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # results.json marks the folder as complete
        if RESULTS_FILE in listed:
            lost[RESULTS_FILE] = listed[RESULTS_FILE]
    for fold, history in rows.items():
        write_history(history_file(folder, fold), sorted(history, key=lambda row: int(row["epoch"])))
    gone: list[str] = []
    for name in sorted(lost, key=lambda name: name == RESULTS_FILE):
        if name == RESULTS_FILE and gone:
            break
        path = _path(experiment.name, lost[name])
        try:
            files.write_bytes(folder / name, lost[name].read(store, path))
        except FileNotFoundError:
            gone.append(f"{store.url}/{path}")
    if gone:
        raise ResultsError(
            f"Result files of {experiment.name} are missing from the store or damaged: {', '.join(gone)}. To recreate "
            f"them from the checkpoints: mbqueue retry {experiment.name}, then mbqueue work"
        )


def _path(experiment: str, file: ResultFile) -> str:
    return f"{STORED_RESULTS}/{experiment}/{file.stored_name}"
