"""Collect what the queue knows about an experiment, for its results and reports. This module does not import torch."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from mbqueue.clock import local_day
from mbqueue.data.elements import symbol_of
from mbqueue.errors import ResultsError
from mbqueue.queue.jobs import Experiment, Job, Kind, SessionRow, State
from mbqueue.queue.store import Queue
from mbqueue.results.members import families_of
from mbqueue.results.record import DatasetFacts, RecordInputs, SessionFacts
from mbqueue.storage.commits import Commits


def record_inputs(
    queue: Queue, experiment: Experiment, *, now: float, fingerprint_changes: Sequence[Mapping[str, Any]] = ()
) -> RecordInputs:
    """Collect the facts about an experiment for its results, such as its dataset, sessions and library versions.

    Args:
        fingerprint_changes: the entries returned by the function `fingerprint_changes`.

    Raises:
        ResultsError: if the experiment has not been prepared yet.
    """
    jobs = queue.jobs(experiment=experiment.name)
    (prepare,) = [job for job in jobs if job.kind is Kind.PREPARE]
    prepared = prepare.result
    if prepared is None or experiment.dataset_hash is None:
        name = experiment.name
        if prepare.state in (State.FAILED, State.CANCELLED):
            how = "failed" if prepare.state is State.FAILED else "was cancelled"
            raise ResultsError(
                f"The data of {name} are not prepared, because the prepare job {how}. For details, run: mbqueue events "
                f"{name}. To prepare the data again, run: mbqueue retry {name}"
            )
        raise ResultsError(f"The data of {name} have not been prepared yet. Start a session with: mbqueue work")
    predicted = {job.fold: job.result for job in jobs if job.kind is Kind.PREDICT and job.fold is not None}
    packages = [family.package for family in families_of(experiment.spec)]
    libraries = ["mbqueue", *packages, "torch", "numpy", "pymatgen", "numba"]
    return RecordInputs(
        experiment=experiment.name,
        spec=experiment.spec,
        spec_hash=experiment.spec_hash,
        dataset=DatasetFacts(
            name=experiment.dataset,
            source=prepared["source"],
            hash=experiment.dataset_hash,
            n=prepared["n"],
            official=prepared["official"],
            dropped=[(crystal_id, reason) for crystal_id, reason in prepared["dropped"]],
            widened_cutoffs=prepared["widened"],
        ),
        folds=experiment.spec["folds"],
        versions={"python": platform.python_version(), **{name: version(name) for name in libraries}},
        sessions=[_session(row, now) for row in queue.sessions(experiment=experiment.name)],
        enqueued_on=local_day(experiment.enqueued_at),
        recorded_at=now,
        fingerprint_changes=fingerprint_changes,
        absent_elements={
            fold: [symbol_of(number) for number in result["absent_elements"]]
            for fold, result in predicted.items()
            if result is not None
        },
        blends={fold: result["blend"] for fold, result in predicted.items() if result and "blend" in result},
    )


def fingerprint_changes(commits: Mapping[int, Commits]) -> list[dict[str, Any]]:
    """List every time that training resumed with a different device, library version or micro-batch size.

    Each entry contains the fold, epoch and step, and what changed.
    """
    newest = {fold: of_fold.newest_manifest() for fold, of_fold in commits.items()}
    return [
        {"fold": fold, **change}
        for fold, manifest in newest.items()
        if manifest is not None
        for change in manifest.fingerprint_changes
    ]


def written_checksums(jobs: Iterable[Job]) -> dict[int, Mapping[str, Any]]:
    """Size and SHA-256 of each file that a fold's `predict` job wrote, by fold."""
    return {
        job.fold: job.result["files"]
        for job in jobs
        if job.kind is Kind.PREDICT and job.fold is not None and job.result is not None and "files" in job.result
    }


def _session(row: SessionRow, now: float) -> SessionFacts:
    end = row.ended_at if row.ended_at is not None else min(now, row.alive_until)
    return SessionFacts(id=row.id, device=row.device, seconds=max(0.0, end - row.started_at))
