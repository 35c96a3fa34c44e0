"""Prune trials of searches, discard checkpoints of pruned trials, and resume pruned trials."""

from __future__ import annotations

import json
from typing import Any

from mbqueue.queue.database import Part, Statements, repeatable
from mbqueue.queue.edges import PRUNED, REWIND, SKIP_ALL
from mbqueue.queue.enqueueing import find_experiment
from mbqueue.queue.jobs import history_row
from mbqueue.queue.notes import note

_HELD = "SELECT 1 FROM jobs WHERE experiment_id = :experiment_id AND state = 'leased' LIMIT 1"
# Sets the skipped jobs of a pruned trial back to waiting, except epochs that early stopping skipped.
_TAKE_UP = """
    UPDATE jobs SET state = 'waiting', changed_at = :now, changed_by = :by, changed_why = 'retried'
    WHERE experiment_id = :experiment_id AND state = 'skipped' AND substr(changed_why, 1, :length) = :pruned
"""
_PRUNED_BECAUSE = """
    SELECT changed_why FROM jobs WHERE experiment_id = :experiment_id AND kind = 'record' AND state = 'skipped'
"""
_EPOCHS = """
    SELECT fold, result FROM jobs
    WHERE experiment_id = :experiment_id AND kind = 'train' AND state = 'committed' ORDER BY fold, epoch
"""
_SPEC = "UPDATE experiments SET spec = :spec WHERE id = :experiment_id"


class Pruning(Part):
    @repeatable
    def prune(self, experiment: str, *, why: str, now: float, by: str = "prune") -> int:
        """Prune a trial: skip all its unfinished jobs. Do nothing while a session is working on the trial.

        Args:
            why: the reason, which begins with `mbqueue.queue.edges.PRUNED`.

        Returns:
            The number of skipped jobs.

        Raises:
            UsageError: if there is no such experiment.
        """
        with self.writing() as db:
            experiment_id = find_experiment(db, experiment, to_change=True).id
            values = {"experiment_id": experiment_id, "why": why, "now": now, "by": by}
            return 0 if db.execute(_HELD, values).fetchone() else db.execute(SKIP_ALL, values).rowcount

    @repeatable
    def discard_checkpoints(self, experiment: str, *, now: float, by: str = "prune") -> bool:
        """Mark a pruned trial's checkpoints as discarded, so that `retry` starts the trial from the beginning.

        Move the trial's training histories into its spec. The caller must remove the checkpoint files afterwards.

        Returns:
            True on success. False if the experiment is not a pruned trial, if its checkpoints were already discarded,
            or if a session is working on the trial.

        Raises:
            UsageError: if there is no such experiment.
        """
        with self.writing() as db:
            found = find_experiment(db, experiment, to_change=True)
            values = {"experiment_id": found.id}
            pruned = db.execute(_PRUNED_BECAUSE, values).fetchone()
            is_pruned = pruned is not None and "trial" in found.spec and pruned["changed_why"].startswith(PRUNED)
            if not is_pruned or found.is_released or db.execute(_HELD, values).fetchone():
                return False
            histories: dict[str, list[dict[str, Any]]] = {str(fold): [] for fold in found.spec["folds"]}
            for row in db.execute(_EPOCHS, values).fetchall():
                histories[str(row["fold"])].append(history_row(json.loads(row["result"])))
            released = {"at": now, "why": pruned["changed_why"], "histories": histories}
            spec = {**found.spec, "trial": {**found.spec["trial"], "released": released}}
            db.execute(_SPEC, {**values, "spec": json.dumps(spec)})
            discarded = "checkpoints discarded; `mbqueue retry` trains the trial from the beginning"
            note(db, discarded, by=by, now=now, experiment_id=found.id)
            return True


def take_up(db: Statements, experiment_id: int, *, by: str, now: float) -> int:
    """Resume a pruned trial, or restart it if its checkpoints were discarded. Return the number of changed jobs."""
    values = {"experiment_id": experiment_id, "pruned": PRUNED, "length": len(PRUNED), "by": by, "now": now}
    changed = db.execute(_TAKE_UP, values).rowcount
    if not changed:
        return 0
    spec = json.loads(db.execute("SELECT spec FROM experiments WHERE id = ?", (experiment_id,)).fetchone()["spec"])
    if "trial" not in spec:
        return changed
    if spec["trial"].get("released"):
        why = "retried from the beginning, because its checkpoints were not kept"
        for fold in map(int, spec["trial"]["released"]["histories"]):
            changed += db.execute(REWIND, {**values, "fold": fold, "to_epoch": 0, "why": why}).rowcount
    spec["trial"] |= {"kept": True, "released": None}
    db.execute(_SPEC, {"experiment_id": experiment_id, "spec": json.dumps(spec)})
    return changed
