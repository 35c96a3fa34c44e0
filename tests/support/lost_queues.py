"""Ways to lose or replace a project's queue, or to make the queue older than the project's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from mbqueue.api import Project
from mbqueue.experiment import Spec, load_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.store import Queue
from mbqueue.storage.manifest import Manifest

LACKS = "The queue lacks"


def spec_of(project: Project, experiment: str = "head_finetune", **overrides: Any) -> Spec:
    return load_spec(project.folder.experiment_file(experiment), overrides={"data.dataset": "sample"} | overrides)


def begin_second(project: Project, *specs: Spec) -> None:
    """Replace the queue with a new one, as earlier versions did after a loss."""
    project.folder.queue_db.unlink(missing_ok=True)
    with Queue(project.folder.queue_db) as queue:
        for spec in specs:
            queue.enqueue(spec, results_dir=f"results/daily/2026-01-02/{spec.name}", now=0.0)


def commit(project: ProjectFolder, spec: Spec, fold: int, *, epoch: int, enqueued: Any = None) -> Manifest:
    """Write the commit of a finished epoch."""
    manifest = Manifest(
        experiment=spec.name,
        spec_hash=spec.hash,
        dataset_hash="d",
        fold=fold,
        epoch=epoch,
        step=3,
        steps_per_epoch=3,
        complete=True,
        fence=1,
        parent=None,
        session="s",
        written_at="",
        size=1,
        sha256=hashlib.sha256(b"x").hexdigest(),
        best=None,
        history=[{"epoch": number, "val_mae": 0.5} for number in range(1, epoch + 1)],
        fingerprint={},
        enqueued=enqueued,
    )
    path = project.checkpoints_dir(spec.name, fold) / f"{manifest.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".pt").write_bytes(b"x")
    path.write_text(json.dumps(manifest.to_json(), indent=2))
    return manifest


def _is_gone(project: Project) -> None:
    project.folder.queue_db.unlink()


def _was_emptied(project: Project) -> None:
    begin_second(project)


def _of_another_experiment(project: Project) -> None:
    begin_second(project, spec_of(project, "full_finetune"))


def _with_fewer_folds(project: Project) -> None:
    begin_second(project, spec_of(project, folds=[0], **{"train.epochs": 5}))


def _with_other_settings(project: Project) -> None:
    begin_second(project, spec_of(project, folds=[0, 1], **{"train.epochs": 5, "train.lr": 0.02}))


def _an_older_one(project: Project) -> None:
    commit(project.folder, spec_of(project, folds=[0, 1], **{"train.epochs": 5}), 0, epoch=4)


def _other_settings_of_commits_alone(project: Project) -> None:
    _with_other_settings(project)
    (project.folder.notes_dir / "head_finetune.json").unlink()


#: State of a lost queue → a function that creates this state, and the text that every command then prints.
STATES: dict[str, tuple[Callable[[Project], None], str]] = {
    "gone": (_is_gone, "There is no queue"),
    "emptied": (_was_emptied, "content was lost"),
    "of another experiment": (_of_another_experiment, f"{LACKS} head_finetune."),
    "with fewer folds": (_with_fewer_folds, f"{LACKS} head_finetune fold 1."),
    "with other settings": (_with_other_settings, f"{LACKS} head_finetune with its previous settings."),
    "other settings, no note": (_other_settings_of_commits_alone, f"{LACKS} head_finetune with its previous settings"),
    "an older one": (_an_older_one, f"{LACKS} 4 finished epochs of head_finetune fold 0."),
}
