"""Predicting any crystals with any models that were trained, outside the queue."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mbqueue import files
from mbqueue.data.crystals import Crystals
from mbqueue.errors import MbqueueError, UsageError
from mbqueue.experiment import DataSpec
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue, queue_exists
from mbqueue.results.cells import csv_text
from mbqueue.results.record import RESULTS_FILE
from mbqueue.session.loading import Progress, load_data
from mbqueue.session.usable import usable_device
from mbqueue.task import FORMATION_ENERGY, Target
from mbqueue.train import chgnet
from mbqueue.train.predict import EnsemblePredictions, predict_crystals


@dataclass(frozen=True)
class EnsembleTable:
    """What some models say of some crystals, in the order of the dataset.

    Attributes:
        target: what the models predict.
        dropped: (id, reason) of what was left out.
        is_compared: whether the targets of the crystals are of what the models predict.
        is_known_data: whether it is the dataset of an experiment, in whose folds each model was trained on most of it.
    """

    crystals: Crystals
    target: Target
    predictions: EnsemblePredictions
    dropped: tuple[tuple[str, str], ...]
    is_known_data: bool
    is_compared: bool = True

    @property
    def mae(self) -> float | None:
        """Mean absolute error of the ensemble against the targets, in their unit; None when a crystal has none.

        It is no test score where a model was trained on the crystals.
        """
        targets = self.crystals.targets
        if not self.is_compared:
            return None
        return float(np.abs(self.predictions.mean - targets).mean()) if np.isfinite(targets).all() else None

    def write(self, path: Path) -> None:
        """Durably write a CSV: id, composition, n_atoms, y_pred, spread, and y_pred_0, y_pred_1, … of each model."""
        each = self.predictions.each
        names = ["id", "composition", "n_atoms", "y_pred", "spread", *(f"y_pred_{i}" for i in range(len(each)))]
        columns = (
            self.crystals.ids,
            self.crystals.compositions(),
            self.crystals.n_atoms.tolist(),
            self.predictions.mean.tolist(),
            self.predictions.spread.tolist(),
            *each.tolist(),
        )
        files.write_text(path, csv_text(names, list(zip(*columns, strict=True))))


def predict_dataset(
    project: ProjectFolder,
    wanted: DataSpec,
    models: Sequence[Path],
    *,
    target_column: str = "",
    strains: int = 0,
    device: str | None = None,
    progress: Progress,
    note: Callable[[str], None],
) -> EnsembleTable:
    """What the models in some files say of a dataset, converted by way of the project's cache.

    Args:
        wanted: which crystals; they need no target.
        models: model_fold_*.pth files.
        target_column: of the dataset's table, to compare with; by default one that is known.
        strains: pairs of opposite small strains that each prediction is averaged over.

    Raises:
        DataError: when the dataset cannot be used.
        CheckpointError: when a file is no CHGNet model.
        UsageError: when the device does not exist, or the models predict different things.
    """
    where = usable_device(device)
    loaded = [chgnet.load_model(path) for path in models]
    target = _one_target(models)
    data = load_data(
        project,
        wanted,
        seed=0,
        dataset_hash=None,
        progress=progress,
        note=note,
        # Without a column that is named, a table can only have formation energies to compare with.
        target=replace(target if target_column else FORMATION_ENERGY.target, column=target_column),
        targets_required=False,
    )
    assert data is not None, "nobody asks this to stop"
    found = predict_crystals(
        chgnet,
        loaded,
        data.graphs,
        device=where,
        strains=strains,
        memory_file=project.device_limits,
        on_progress=progress("predicting"),
    )
    if target.is_class:
        found = EnsemblePredictions(each=1 / (1 + np.exp(-found.each)))
    return EnsembleTable(
        data.crystals,
        target,
        found,
        data.dropped,
        is_known_data=_is_known_data(project, data.crystals.hash, models),
        is_compared=bool(target_column) or target.kind == "energy",
    )


def _one_target(models: Sequence[Path]) -> Target:
    """What all models predict.

    Raises:
        UsageError: when that is not one thing.
    """
    first = chgnet.target_of_model(models[0])
    for path in models[1:]:
        other = chgnet.target_of_model(path)
        if (other.name, other.unit, other.kind) != (first.name, first.unit, first.kind):
            raise UsageError(
                f"{models[0]} predicts the {first.axis}, and {path} the {other.axis}: they make no ensemble. Give "
                "models of one target."
            )
    return first


def _is_known_data(project: ProjectFolder, dataset_hash: str, models: Sequence[Path]) -> bool:
    """Whether an experiment in the queue, or one whose results lie beside a model, has this dataset."""
    for folder in {path.parent for path in models}:
        try:
            content = json.loads((folder / RESULTS_FILE).read_bytes())
            if content["dataset"]["hash"] == dataset_hash:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a model may lie anywhere, beside anything
    try:
        if not queue_exists(project):
            return False
        with open_queue(project, read_only=True) as queue:
            return any(experiment.dataset_hash == dataset_hash for experiment in queue.experiments())
    except MbqueueError:
        return False  # a prediction needs no queue
