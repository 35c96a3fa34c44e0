"""The `record` job: the experiment's scores and the files that people and the leaderboard read."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import version

from mbqueue.queue.jobs import Kind, Lease, SessionRow
from mbqueue.results.record import DatasetFacts, RecordInputs, SessionFacts, record_experiment
from mbqueue.session.workplace import Workplace
from mbqueue.train.checkpoint import Checkpoints

LIBRARIES = ("mbqueue", "chgnet", "torch", "numpy", "pymatgen", "numba")


def run(place: Workplace, lease: Lease) -> str:
    """Score the folds, write results.json, RESULTS.md and matbench's file, commit, and say the score."""
    job = lease.job
    experiment, spec = place.experiment_of(job)
    (prepared,) = [j.result for j in place.queue.jobs(experiment=experiment.name) if j.kind is Kind.PREPARE]
    assert prepared is not None
    assert experiment.dataset_hash is not None
    changes = []
    for fold in spec.folds:
        newest = Checkpoints(place.project.checkpoints_dir(experiment.name, fold)).newest()
        if newest is not None:
            changes += [{"fold": fold, **change} for change in newest.fingerprint_changes]
    content = record_experiment(
        place.project.root / experiment.results_dir,
        RecordInputs(
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
            fingerprint_changes=changes,
        ),
    )
    mae = content["summary"]["mae"]
    result = {"mae": mae["mean"], "mae_std": mae["std"]}
    place.queue.commit(lease, result=result, now=place.clock.now())
    return (
        f"MAE {mae['mean']:.4f} ± {mae['std']:.4f} eV/atom over {len(spec.folds)} folds; see {experiment.results_dir}"
    )


def _facts(row: SessionRow, place: Workplace) -> SessionFacts:
    end = row.ended_at if row.ended_at is not None else min(place.clock.now(), row.alive_until)
    return SessionFacts(id=row.id, device=row.device, seconds=max(0.0, end - row.started_at))
