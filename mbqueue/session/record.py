"""The `record` job: the experiment's scores and the files that people and the leaderboard read."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from typing import Any

from mbqueue.data.elements import symbol_of
from mbqueue.experiment import Spec
from mbqueue.queue.jobs import Experiment, Kind, Lease, SessionRow
from mbqueue.results.record import DatasetFacts, RecordInputs, SessionFacts, broken_folds, record_experiment
from mbqueue.session.workplace import Rewound, Workplace
from mbqueue.train.checkpoint import Checkpoints

LIBRARIES = ("mbqueue", "chgnet", "torch", "numpy", "pymatgen", "numba")


def run(place: Workplace, lease: Lease) -> str:
    """Score the folds, write results.json, RESULTS.md and matbench's file, commit, and say the score.

    Raises:
        Rewound: a fold's files are missing or damaged; it is predicted again, from its checkpoints.
    """
    experiment, spec = place.experiment_of(lease.job)
    folder = place.project.root / experiment.results_dir
    folder.mkdir(parents=True, exist_ok=True)
    broken = broken_folds(folder, spec.folds)
    if broken:
        now, epochs = place.clock.now(), spec.train.epochs
        for fold, why in broken.items():
            place.queue.rewind(experiment.name, fold, to_epoch=epochs, why=why, now=now, by=place.session)
        raise Rewound(f"{' '.join(broken.values())} What is missing is made again from the checkpoints.")

    def commit(content: dict[str, Any], publish: Callable[[], None]) -> None:
        mae = content["summary"]["mae"]
        result = {"mae": mae["mean"], "mae_std": mae["std"]}
        place.queue.commit(lease, result=result, now=place.clock.now(), publish=publish)

    content = record_experiment(folder, _inputs(place, experiment, spec), commit=commit)
    mae = content["summary"]["mae"]
    over = f"{len(spec.folds)} folds" if len(spec.folds) > 1 else "1 fold"
    return f"MAE {mae['mean']:.4f} ± {mae['std']:.4f} eV/atom over {over}; see {experiment.results_dir}"


def _inputs(place: Workplace, experiment: Experiment, spec: Spec) -> RecordInputs:
    jobs = place.queue.jobs(experiment=experiment.name)
    (prepared,) = [job.result for job in jobs if job.kind is Kind.PREPARE]
    predicted = {job.fold: job.result for job in jobs if job.kind is Kind.PREDICT and job.fold is not None}
    assert prepared is not None
    assert experiment.dataset_hash is not None
    newest = {fold: Checkpoints(place.project.checkpoints_dir(experiment.name, fold)).newest() for fold in spec.folds}
    return RecordInputs(
        experiment=experiment.name,
        spec=spec.to_json(),
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
        folds=spec.folds,
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        sessions=[_facts(row, place) for row in place.queue.sessions(experiment=experiment.name)],
        enqueued_on=datetime.fromtimestamp(experiment.enqueued_at).astimezone().strftime("%Y-%m-%d"),
        recorded_at=place.clock.now(),
        fingerprint_changes=[
            {"fold": fold, **change}
            for fold, manifest in newest.items()
            if manifest is not None
            for change in manifest.fingerprint_changes
        ],
        absent_elements={
            fold: [symbol_of(number) for number in result["absent_elements"]]
            for fold, result in predicted.items()
            if result is not None
        },
    )


def _facts(row: SessionRow, place: Workplace) -> SessionFacts:
    end = row.ended_at if row.ended_at is not None else min(place.clock.now(), row.alive_until)
    return SessionFacts(id=row.id, device=row.device, seconds=max(0.0, end - row.started_at))
