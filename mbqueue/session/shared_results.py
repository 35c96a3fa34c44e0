"""Result files of jobs that other machines did, by way of the object store. Without torch.

What a job left is listed, with sizes and hashes, in the result that the queue holds of it: written by the very
transaction that committed the job, so there is one truth and nothing to merge. The files are in the store under names
that contain their hash. They are sent before the job is committed, and never change.
"""

from __future__ import annotations

import hashlib
import re
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
from mbqueue.session.record_inputs import written_facts
from mbqueue.storage.objects import ObjectStore

_HASH_DIGITS = 16

#: Names that jobs give to files; the queue may be another's server, and no name of it may lead out of the folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

#: Name → size and SHA-256 (`mbqueue.results.record.fold_facts`).
Facts = Mapping[str, Mapping[str, Any]]


def send_results(store: ObjectStore, experiment: str, folder: Path, facts: Facts) -> None:
    """Put a job's files into the store, before the job is committed."""
    there = store.names(f"{STORED_RESULTS}/{experiment}")
    for name, fact in facts.items():
        path = _path(experiment, name, fact)
        if path.rpartition("/")[2] not in there:
            store.put(path, (folder / name).read_bytes())


def send_local_results(project: ProjectFolder, queue: Queue, store: ObjectStore) -> None:
    """Put into a store what folds that were predicted before it was set have left on this machine."""
    for experiment in queue.experiments():
        folder = project.working_results(experiment.results_dir)
        for facts in written_facts(queue.jobs(experiment=experiment.name, state=State.COMMITTED)).values():
            whole = {name: fact for name, fact in facts.items() if _is_there(folder / name, fact)}
            if whole:
                send_results(store, experiment.name, folder, whole)


def recorded_facts(folder: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of what `record` wrote itself."""
    path = folder / RESULTS_FILE
    of_results = {"size": path.stat().st_size, "sha256": files.sha256_of_file(path)}
    return {name: content["run"]["files"].get(name, of_results) for name in recorded_names(content)}


def fetch_results(store: ObjectStore, experiment: Experiment, jobs: Iterable[Job], folder: Path) -> None:
    """Copy to ``folder`` what committed jobs left and is not there with these very bytes.

    The histories of folds that are still being trained are written from the queue, which has them row by row.

    Raises:
        ResultsError: when a file is not in the store, or not what was sent.
    """
    done = [job for job in jobs if job.state is State.COMMITTED and job.result is not None]
    predicted = {job.fold for job in done if job.kind is Kind.PREDICT}
    rows: dict[int, list[dict[str, Any]]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for job in done:
        assert job.result is not None
        facts.update({name: fact for name, fact in job.result.get("files", {}).items() if _NAME.fullmatch(name)})
        if job.kind is Kind.TRAIN and job.fold is not None and job.fold not in predicted:
            rows.setdefault(job.fold, []).append(history_row(job.result))
    lost = {name: fact for name, fact in facts.items() if not _is_there(folder / name, fact)}
    is_recorded = any(job.kind is Kind.RECORD for job in done)
    if not is_recorded or (lost and RESULTS_FILE in facts):
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # it says that the folder is complete
        if RESULTS_FILE in facts:
            lost[RESULTS_FILE] = facts[RESULTS_FILE]
    for fold, history in rows.items():
        write_history(history_file(folder, fold), sorted(history, key=lambda row: int(row["epoch"])))
    gone: list[str] = []
    for name in sorted(lost, key=lambda name: name == RESULTS_FILE):
        if name == RESULTS_FILE and gone:
            break
        content = _content(store, _path(experiment.name, name, lost[name]), lost[name])
        if content is None:
            gone.append(f"{store.url}/{_path(experiment.name, name, lost[name])}")
        else:
            files.write_bytes(folder / name, content)
    if gone:
        raise ResultsError(
            f"Results of {experiment.name} are missing or not what was sent: {', '.join(gone)}. They can be made again "
            f"from the checkpoints: mbqueue retry {experiment.name}, then mbqueue work"
        )


def _is_there(path: Path, fact: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == fact["size"] and files.sha256_of_file(path) == fact["sha256"])
    except FileNotFoundError:
        return False


def _content(store: ObjectStore, path: str, fact: Mapping[str, Any]) -> bytes | None:
    try:
        content = store.read(path, at_most=fact["size"])
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == fact["sha256"] else None


def _path(experiment: str, name: str, fact: Mapping[str, Any]) -> str:
    return f"{STORED_RESULTS}/{experiment}/{fact['sha256'][:_HASH_DIGITS]}-{name}"
