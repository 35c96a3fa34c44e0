"""Rebuild a queue from commits and notes.

A rebuild starts from a snapshot or an empty database. The rebuilt queue gets every known experiment (`enqueue_again`),
and every fold advances to its newest commit (`trained_by`). `restore` uses `trained_by` too, but starts from the
archive's database.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.drive.snapshots import check_enqueued
from mbqueue.errors import QueueError
from mbqueue.experiment import parse_spec
from mbqueue.history import is_out_of_patience
from mbqueue.project import ProjectFolder
from mbqueue.provenance import Released
from mbqueue.queue.adopting import Trained
from mbqueue.queue.jobs import Experiment
from mbqueue.queue.sqlite import settle
from mbqueue.queue.store import Queue
from mbqueue.storage.manifest import Manifest


def rebuild_queue(
    project: ProjectFolder, fill: Callable[[Queue], None], *, lay: Callable[[Path], bool] = lambda _path: False
) -> None:
    """Build the project's queue, and put it in place once it is complete. An empty queue is discarded.

    Args:
        fill: adds experiments and their progress to the new queue.
        lay: may write an initial database to the given path, and returns whether it has done so.
    """
    building = project.live_dir / f"{files.TEMP_PREFIX}queue.db"
    for left in project.live_dir.glob(f"{building.name}*"):
        left.unlink()
    was_laid = lay(building)
    with Queue(building) as queue:
        fill(queue)
        is_empty = not was_laid and not queue.experiments()
    settle(building)
    if is_empty:
        building.unlink()
        return
    # Give the queue its final name only now, so that no process can open an incomplete queue.
    building.replace(project.queue_db)
    files.fsync_dir(project.live_dir)


def trained_by(experiment: Experiment, fold: int, manifest: Manifest | None) -> Trained:
    """Derive a fold's progress from its newest commit, for the queue to adopt.

    Args:
        manifest: manifest of the newest commit; None for a fold without commits.
    """
    if manifest is None:
        return Trained(experiment=experiment.name, fold=fold, history=(), source="no commit")
    best = manifest.best["epoch"] if manifest.best else 0
    stops = is_out_of_patience(experiment.spec["train"]["patience"], epoch=manifest.epoch, best=best)
    return Trained(
        experiment=experiment.name,
        fold=fold,
        history=manifest.history,
        fence=manifest.fence,
        is_within=not manifest.complete,
        skip_rest=manifest.complete and stops,
        source=f"{manifest.stem} of session {manifest.session}",
    )


def enqueue_again(queue: Queue, record: Mapping[str, Any], *, now: float, by: str, note: Callable[[str], None]) -> bool:
    """Enqueue an experiment again, from a record that `enqueued_record` created.

    Returns:
        Whether anything was added to the queue.
    """
    spec = parse_spec(record["spec"], source="what is published")
    known = {one.name: one for one in queue.experiments()}
    if spec.name in known and not known[spec.name].is_of(spec):
        note(f"The published spec of {spec.name} differs from the spec in the queue, so its commits are ignored.")
        return False
    if spec.name in known and set(spec.folds) <= set(known[spec.name].spec["folds"]):
        return False
    taken = {one.results_dir for one in known.values() if one.name != spec.name}
    if record["results_dir"] in taken:
        note(f"{spec.name} cannot be enqueued again: another experiment writes to {record['results_dir']}.")
        return False
    queue.enqueue(spec, results_dir=record["results_dir"], now=now, priority=record["priority"], by=by)
    if spec.trial is not None and spec.trial.released is not None:
        _take_over_released(queue, spec.name, spec.trial.released, now=now, by=by)
    return True


def _take_over_released(queue: Queue, name: str, released: Released, *, now: float, by: str) -> None:
    """Restore a pruned trial whose checkpoints were removed, from the training histories in its spec."""
    for fold, history in released.histories.items():
        trained = Trained(experiment=name, fold=int(fold), history=history, source="the histories in its spec")
        queue.adopt(trained, now=now, by=by)
    queue.prune(name, why=released.why, now=now, by=by)


def record_in(manifest: Manifest, source: str) -> dict[str, Any] | None:
    """Return a manifest's record of how the experiment was enqueued; None if the manifest has no valid record."""
    record = manifest.enqueued
    try:
        if record is not None:
            check_enqueued(record, source=source)
    except QueueError:
        return None
    return record if record is not None and record["spec"]["name"] == manifest.experiment else None
