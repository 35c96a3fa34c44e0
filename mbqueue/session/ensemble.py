"""Predict any crystals with any trained models, outside the queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mbqueue import files
from mbqueue.clock import SystemClock
from mbqueue.data.crystals import Crystals
from mbqueue.errors import UsageError
from mbqueue.experiment import DataSpec
from mbqueue.project import ProjectFolder
from mbqueue.results.cells import csv_text
from mbqueue.session.device_check import tested_device
from mbqueue.session.loading import Progress, load_data
from mbqueue.session.model_origins import is_known_data, unseen_elements
from mbqueue.session.prediction_files import COLUMNS, read_files, require_table
from mbqueue.session.sources import DataRequest
from mbqueue.task import FORMATION_ENERGY, Target
from mbqueue.train.family import ModelFamily, family_of_file
from mbqueue.train.partial_outputs import forget_old
from mbqueue.train.predict import EnsemblePredictions, predict_crystals


@dataclass(frozen=True)
class EnsembleTable:
    """The predictions of several models for a dataset's crystals, in the dataset's order.

    Attributes:
        target: what the models predict.
        dropped: (id, reason) of each crystal left out.
        is_compared: whether the crystals' targets are the property that the models predict.
        is_known_data: whether an experiment used this dataset. If so, its models were trained on most of the crystals.
        made_from: the files of the dataset and of the models.
    """

    crystals: Crystals
    target: Target
    predictions: EnsemblePredictions
    dropped: tuple[tuple[str, str], ...]
    is_known_data: bool
    is_compared: bool = True
    made_from: tuple[Path, ...] = ()

    @property
    def mae(self) -> float | None:
        """Mean absolute error of the ensemble, in the target's unit; None if a crystal has no target to compare with.

        The error is not a test score if a model was trained on these crystals.
        """
        targets = self.crystals.targets
        if not self.is_compared:
            return None
        return float(np.abs(self.predictions.mean - targets).mean()) if np.isfinite(targets).all() else None

    def write(self, path: str | Path, *, force: bool = False) -> None:
        """Write a CSV durably: id, composition, n_atoms, y_pred, spread, and a column y_pred_i for each model.

        Raises:
            UsageError: if the file is in `made_from`; or if, without ``force``, it would replace a file that `write`
                did not create.
        """
        path = Path(path)
        require_table(path, self.made_from, force=force)
        each = self.predictions.each
        names = [*COLUMNS, *(f"y_pred_{i}" for i in range(len(each)))]
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
    data_spec: DataSpec,
    models: Sequence[str | Path],
    *,
    target_column: str = "",
    strains: int = 0,
    device: str | None = None,
    progress: Progress,
    note: Callable[[str], None],
) -> EnsembleTable:
    """Predict a dataset's crystals with one or more model files.

    The project's cache keeps the converted crystals. Partial predictions are kept for a week, so that an interrupted
    prediction can resume.

    Args:
        data_spec: the [data] section of the crystals to predict, which may have no targets.
        models: model_fold_*.pth files.
        target_column: column of the dataset's table with the true values; by default, a column with a name that mbqueue
            recognises.
        strains: number of pairs of small opposite strains over which each prediction is averaged.

    Raises:
        DataError: if the dataset cannot be used.
        CheckpointError: if a file is not a model.
        UsageError: if the device does not exist, or the models are of different kinds or predict different targets.
    """
    where, paths = tested_device(device), [Path(model) for model in models]
    family = _one_family(paths)
    loaded = [family.load_model(path) for path in paths]
    target = _one_target(family, paths)
    # If no column is named, look only for formation energies.
    compared = replace(target if target_column else FORMATION_ENERGY.target, column=target_column)
    request = DataRequest(data=data_spec, target=compared, targets_required=False)
    data = load_data(project, request, dataset_hash=None, progress=progress, note=note)
    assert data is not None, "no stop was requested"
    for warning in unseen_elements(project, data.crystals, paths):
        note(warning)
    keep_in = project.predictions_dir("predict")
    forget_old(keep_in, now=SystemClock().now())
    found = predict_crystals(
        family,
        loaded,
        data.graphs,
        device=where,
        strains=strains,
        memory_file=project.device_limits,
        on_progress=progress("predicting"),
        keep_in=keep_in,
    )
    if target.is_class:
        found = EnsemblePredictions(each=1 / (1 + np.exp(-found.each)))
    return EnsembleTable(
        data.crystals,
        target,
        found,
        data.dropped,
        is_known_data=is_known_data(project, data.crystals.hash, paths),
        is_compared=bool(target_column) or target.kind == "energy",
        made_from=read_files(project, data_spec.dataset, paths),
    )


def _one_family(models: Sequence[Path]) -> ModelFamily:
    first = family_of_file(models[0])
    for path in models[1:]:
        if family_of_file(path) is not first:
            raise UsageError(
                f"{models[0]} and {path} are models of different kinds, so they cannot be averaged. Use models with "
                "weights of the same kind."
            )
    return first


def _one_target(family: ModelFamily, models: Sequence[Path]) -> Target:
    first = family.target_of_model(models[0])
    for path in models[1:]:
        other = family.target_of_model(path)
        if (other.name, other.unit, other.kind) != (first.name, first.unit, first.kind):
            raise UsageError(
                f"{models[0]} predicts the {first.axis}, but {path} predicts the {other.axis}, so they cannot be "
                "averaged. Use models with the same target."
            )
    return first
