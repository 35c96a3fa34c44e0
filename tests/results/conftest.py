"""A small recorded experiment with made-up results: five folds of a few crystals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbqueue.experiment import Spec
from mbqueue.results.record import DatasetFacts, RecordInputs, SessionFacts, record_experiment
from mbqueue.results.tables import (
    Predictions,
    history_file,
    model_file,
    predictions_file,
    write_history,
    write_predictions,
)
from mbqueue.task import FORMATION_ENERGY

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


@pytest.fixture(scope="session")
def make_inputs() -> Callable[[], RecordInputs]:
    """The function ``made_up_inputs``, for fixtures of a module."""
    return made_up_inputs


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


@pytest.fixture(scope="session")
def official_predictions() -> dict[int, Predictions]:
    """All five official test sets with shuffled rows, since nothing may depend on their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports warn
        from matbench.metadata import mbv01_validation
    rng = np.random.default_rng(0)
    folds = {}
    for fold, split in enumerate(mbv01_validation.splits["matbench_mp_e_form"].values()):
        ids = [split.test[i] for i in rng.permutation(len(split.test))]
        y_true = rng.normal(-1.5, 1.0, len(ids))
        y_pred = y_true + rng.laplace(0, 0.02, len(ids))
        folds[fold] = Predictions(ids, ["NaCl"] * len(ids), np.full(len(ids), 2), y_true, y_pred)
    return folds


@pytest.fixture(scope="session")
def recorded_official(tmp_path_factory, official_predictions):
    folder = tmp_path_factory.mktemp("official")
    for fold, table in official_predictions.items():
        write_predictions(predictions_file(folder, fold), table)
        write_history(history_file(folder, fold), [])
        model_file(folder, fold).write_bytes(b"weights")
    return folder


@pytest.fixture(scope="session")
def official_inputs():
    dataset = DatasetFacts(
        name="matbench_mp_e_form", source="matminer", hash="cd" * 32, n=FORMATION_ENERGY.n, official=True
    )
    return dataclasses.replace(made_up_inputs(), dataset=dataset, folds=range(5))
