"""A small recorded experiment with made-up results: five folds of a few crystals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbqueue.experiment import Spec, parse_spec
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.record import DatasetFacts, RecordInputs, SessionFacts, record_experiment
from mbqueue.results.tables import (
    Predictions,
    history_file,
    model_file,
    predictions_file,
    write_history,
    write_predictions,
)
from mbqueue.task import Task

FORMULAS = ["NaCl", "Fe2O3", "SiC", "LiFePO4", "GaN", "CsCl", "MgO", "TiO2"]


def made_up_history(epochs: int, *, seed: int = 0, session: str = "s1", device: str = "cpu") -> list[dict[str, Any]]:
    """Draw a history whose errors fall with some noise; the same seed gives the same rows."""
    rng = np.random.default_rng(seed)
    return [
        {
            "epoch": epoch,
            "train_loss": float(0.02 / epoch + rng.uniform(0, 1e-3)),
            "train_mae": float(0.1 / epoch + rng.uniform(0, 1e-3)),
            "val_loss": float(0.03 / epoch**0.7 + rng.uniform(0, 1e-3)),
            "val_mae": float(0.12 / epoch**0.7 + rng.uniform(0, 1e-3)),
            "lr": 3e-4 * (1 - (epoch - 1) / epochs),
            "grad_norm": float(rng.uniform(0.5, 2)),
            "seconds": 400.0 + epoch,
            "structures_per_second": 240.0 - epoch,
            "session": session,
            "device": device,
        }
        for epoch in range(1, epochs + 1)
    ]


def made_up_predictions(n: int, *, fold: int = 0, seed: int = 0, spread: float = 0.02) -> Predictions:
    """Draw predictions; the targets depend only on ``fold``, so two seeds imitate two models on the same crystals."""
    crystals = np.random.default_rng([fold, 7])
    y_true = crystals.normal(-1.5, 1.0, n)
    noise = np.random.default_rng([fold, seed, 8])
    return Predictions(
        [f"x-{fold}-{row:04d}" for row in range(n)],
        [FORMULAS[i] for i in crystals.integers(0, len(FORMULAS), n)],
        crystals.integers(1, 60, n),
        y_true,
        y_true + noise.laplace(0, spread, n),
    )


def made_up_inputs() -> RecordInputs:
    """Return the inputs of `record` for two folds of a user's own dataset."""
    spec = Spec(name="small")
    return RecordInputs(
        experiment="small",
        spec=spec.to_json(),
        spec_hash=spec.hash,
        dataset=DatasetFacts(
            name="sample",
            source="made up",
            hash="ab" * 32,
            n=80,
            official=False,
            dropped=[("x-9", "two atoms on one place")],
            widened_cutoffs=2,
        ),
        folds=(0, 1),
        versions={"mbqueue": "0.1.0", "torch": "2.13.0"},
        sessions=[SessionFacts(id="s1", device="cpu", seconds=5400.0)],
        enqueued_on="2026-11-20",
        recorded_at=1_795_000_000.0,
    )


@pytest.fixture
def inputs() -> RecordInputs:
    """``made_up_inputs``."""
    return made_up_inputs()


@pytest.fixture
def fill() -> Callable[..., Path]:
    """A function that writes the files of some folds, as train and predict jobs do."""

    def write(folder: Path, *, folds: tuple[int, ...] = (0, 1), n: int = 40, epochs: int = 3, seed: int = 0) -> Path:
        for fold in folds:
            write_history(history_file(folder, fold), made_up_history(epochs, seed=seed + fold))
            write_predictions(predictions_file(folder, fold), made_up_predictions(n, fold=fold, seed=seed))
            model_file(folder, fold).write_bytes(b"weights")
        return folder

    return write


@pytest.fixture
def recorded_folder(tmp_path: Path, fill: Callable[..., Path], inputs: RecordInputs) -> Path:
    """A complete results folder."""
    folder = fill(tmp_path / "results" / "daily" / "2026-11-20" / "small")
    record_experiment(folder, inputs)
    return folder


@pytest.fixture
def history() -> Callable[..., list[dict[str, Any]]]:
    """``made_up_history``."""
    return made_up_history


@pytest.fixture
def predictions() -> Callable[..., Predictions]:
    """``made_up_predictions``."""
    return made_up_predictions


@cache
def made_up_folds(task: Task) -> dict[int, Predictions]:
    """All five official test sets with made-up numbers and shuffled rows, since nothing may depend on their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports warn
        from matbench.metadata import mbv01_validation
    rng = np.random.default_rng(0)
    folds = {}
    for fold, split in enumerate(mbv01_validation.splits[task.dataset].values()):
        n = len(split.test)
        y_true = rng.normal(0, 1, n)
        y_pred = y_true + rng.normal(0, 0.5, n)
        if task.target.is_class:
            y_true, y_pred = (y_true > 0).astype(float), 1 / (1 + np.exp(-y_pred))
        ids = [split.test[row] for row in rng.permutation(n)]
        folds[fold] = Predictions(ids, ["NaCl"] * n, np.full(n, 2), y_true, y_pred)
    return folds


@pytest.fixture(scope="session")
def official_predictions() -> Callable[[Task], dict[int, Predictions]]:
    """``made_up_folds``."""
    return made_up_folds


@pytest.fixture(scope="session")
def record_task() -> Callable[[Task, Path], dict[str, Any]]:
    """A function that records ``made_up_folds`` in a folder and returns the content of results.json."""

    def record(task: Task, folder: Path) -> dict[str, Any]:
        for fold, table in made_up_folds(task).items():
            write_predictions(predictions_file(folder, fold), table)
            write_history(history_file(folder, fold), [])
            model_file(folder, fold).write_bytes(b"weights")
        inputs = made_up_inputs()
        spec = parse_spec({"name": f"mine-{task.dataset}", "data": {"dataset": task.dataset}}, source="test")
        dataset = dataclasses.replace(
            inputs.dataset, name=task.dataset, source=task.dataset, n=task.n, official=True, dropped=[]
        )
        whole = dataclasses.replace(
            inputs,
            experiment=spec.name,
            spec=spec.to_json(),
            spec_hash=spec.hash,
            dataset=dataset,
            folds=tuple(range(5)),
        )
        return record_experiment(folder, whole)

    return record


@pytest.fixture(scope="session")
def recorded_task(
    tmp_path_factory: pytest.TempPathFactory, record_task: Callable[[Task, Path], dict[str, Any]]
) -> Callable[[Task], Recorded]:
    """A function that returns a recorded task, which tests must not change."""

    @cache
    def recorded(task: Task) -> Recorded:
        folder = tmp_path_factory.mktemp(task.dataset)
        record_task(task, folder)
        return read_recorded(folder)

    return recorded
