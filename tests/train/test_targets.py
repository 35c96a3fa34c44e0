"""For targets of every kind: the start of training, the loss, and the predictions of model files."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chgnet.model import CHGNet

from mbqueue.experiment import TrainSpec
from mbqueue.files import write_bytes
from mbqueue.train.backbone import is_prepared, kinds_needed, open_frozen, prepare_frozen
from mbqueue.train.chgnet import model_bytes
from mbqueue.train.objective import Objective
from mbqueue.train.references import compositions, fit_classes, fit_composition, spread_of

KINDS = ("energy", "scalar", "class")


def shares_of(bench: Any) -> np.ndarray:
    return compositions(bench.crystals.atomic_numbers, bench.crystals.atom_offsets)


@pytest.mark.parametrize("trainable", ["all", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_chgnets_own_predict_structure_gives_the_property_in_its_unit(
    bench_of: Any, helpers: Any, tmp_path: Path, kind: str, trainable: str
) -> None:
    bench = bench_of(kind)
    run = bench.run(tmp_path, trainable=trainable)
    for epoch in (1, 2):
        helpers.train_epoch(run, epoch)
    model = run.best_model()
    write_bytes(tmp_path / "model.pth", model_bytes(model))
    predicted = run.predict_test(model)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock CHGNet enables gradients even when it predicts only energies
        stock = CHGNet.from_file(str(tmp_path / "model.pth"), use_device="cpu")
        theirs = stock.predict_structure([bench.crystals.structure(row) for row in run.rows.test], task="e")
    outputs = np.array([one["e"] for one in theirs], np.float64)
    expected = 1 / (1 + np.exp(-outputs)) if kind == "class" else outputs
    size = np.abs(bench.crystals.targets).max()
    assert np.abs(predicted - expected).max() < 2e-5 * max(1.0, size)


@pytest.mark.parametrize("trainable", ["all", "head"])
@pytest.mark.parametrize("kind", ["scalar", "class"])
def test_training_begins_at_the_model_of_the_composition(
    bench_of: Any, tmp_path: Path, kind: str, trainable: str
) -> None:
    bench = bench_of(kind)
    run = bench.run(tmp_path, trainable=trainable)
    shares, targets = shares_of(bench), bench.crystals.targets
    fitted = (fit_classes if kind == "class" else fit_composition)(shares[run.rows.train], targets[run.rows.train])
    output = torch.from_numpy(run._inference.outputs(run._start.model, run.rows.test, should_stop=lambda: False))
    expected = fitted.predict(shares[run.rows.test])
    if kind == "class":
        expected = 1 / (1 + np.exp(-expected))
    found = run._start.objective.prediction(output).numpy()
    assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(targets).max())


@pytest.mark.parametrize(
    ("kind", "trainable", "epochs"),
    [("scalar", "all", 20), ("scalar", "head", 40), ("class", "all", 8), ("class", "head", 20)],
)
def test_training_learns_what_the_composition_does_not_explain(
    bench_of: Any, helpers: Any, tmp_path: Path, kind: str, trainable: str, epochs: int
) -> None:
    bench = bench_of(kind)
    run = bench.run(tmp_path, trainable=trainable, epochs=epochs, lr=1e-2)
    for epoch in range(1, epochs + 1):
        helpers.train_epoch(run, epoch)
    losses = [row["train_loss"] for row in run.history()]
    assert losses[-1] < 0.7 * losses[0]


def test_a_scalars_residuals_have_about_unit_spread_in_training(bench_of: Any, tmp_path: Path) -> None:
    bench = bench_of("scalar")
    run = bench.run(tmp_path)
    rows, scale = run.rows.train, run._start.objective.scale
    shares, targets = shares_of(bench)[rows], bench.crystals.targets[rows]
    residuals = targets - fit_composition(shares, targets).predict(shares)
    assert 0.5 < np.abs(residuals / scale).mean() * np.sqrt(np.pi / 2) < 1.5
    assert np.frexp(scale)[0] == 0.5, "a power of two loses no digit when it is folded into weights"


@pytest.mark.parametrize("spread", [1e-12, 0.003, 1.0, 700.0])
def test_the_scale_is_the_power_of_two_next_to_the_spread(spread: float) -> None:
    residuals = np.random.default_rng(0).normal(0, spread, 100_000)
    assert 2**-0.52 < spread_of(residuals) / max(spread, 2.0**-30) < 2**0.52


def test_the_ridge_is_the_one_with_the_least_error_of_crystals_left_out_one_at_a_time() -> None:
    rng = np.random.default_rng(5)
    shares = np.zeros((40, 94))
    shares[:, :12] = rng.dirichlet(np.full(12, 0.3), 40)
    targets = shares[:, :12] @ rng.normal(0, 2, 12) + 50 + rng.normal(0, 1.0, 40)

    def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
        return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)

    def left_out(strength: float) -> float:
        centred, errors = targets - targets.mean(), []
        for one in range(40):
            others = np.arange(40) != one
            errors.append(centred[one] - shares[one, :12] @ ridge(shares[others, :12], centred[others], strength))
        return float(np.square(errors).mean())

    strengths = 10.0 ** np.arange(-3, 2.01, 0.5)
    best = min(strengths, key=left_out)
    expected = targets.mean() + ridge(shares[:, :12], targets - targets.mean(), best)
    fitted = fit_composition(shares, targets)
    assert np.allclose(fitted.values[:12], expected, atol=1e-8)
    assert np.allclose(fitted.values[12:], targets.mean()), "an element that was not in the fit counts as the mean"
    assert fitted.absent == tuple(range(13, 95))


def test_the_logistic_model_is_where_the_gradient_of_its_loss_is_zero() -> None:
    rng = np.random.default_rng(5)
    shares = np.zeros((200, 94))
    shares[:, :9] = rng.dirichlet(np.full(9, 0.3), 200)
    classes = (shares[:, 0] + rng.normal(0, 0.2, 200) > 0.3).astype(float)
    fitted = fit_classes(shares, classes)
    base = np.log(classes.mean() / (1 - classes.mean()))
    probability = 1 / (1 + np.exp(-fitted.predict(shares)))
    gradient = shares[:, :9].T @ (classes - probability) - (fitted.values[:9] - base)
    assert np.abs(gradient).max() < 1e-8
    assert np.allclose(fitted.values[9:], base)


def test_a_class_is_trained_by_its_cross_entropy_whatever_the_loss() -> None:
    output, target = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    probability = 1 / (1 + np.exp(-output.numpy()))
    expected = -np.log(probability[0]) - np.log(1 - probability[1])
    objective = Objective(TrainSpec(loss="l1"), "class")
    assert float(objective.loss_sum(output, target)) == pytest.approx(expected)
    assert objective.prediction(output).numpy() == pytest.approx(probability)
    assert float(objective.abs_error_sum(output, target)) == pytest.approx(1 - probability[0] + probability[1])


def test_a_scalars_loss_is_that_of_targets_in_units_of_the_scale() -> None:
    output, target = torch.tensor([1.5, -2.0]), torch.tensor([400.0, -256.0])
    objective = Objective(TrainSpec(loss="l2"), "scalar", scale=256.0)
    assert float(objective.loss_sum(output, target)) == pytest.approx((1.5 - 400 / 256) ** 2 + 1.0)
    assert objective.prediction(output).tolist() == [384.0, -512.0]
    assert float(objective.abs_error_sum(output, target)) == 16.0 + 256.0


def test_scalars_and_classes_of_the_same_crystals_share_the_frozen_backbones_output(
    bench_of: Any, helpers: Any, tmp_path: Path
) -> None:
    scalar, one_class = (bench_of(kind) for kind in ("scalar", "class"))
    spec = helpers.small_spec(kind="scalar", trainable="head")
    first = open_frozen(spec, scalar.crystals, tmp_path)
    assert prepare_frozen(spec, scalar.cache, first, device=torch.device("cpu"))
    second = helpers.small_spec(kind="class", trainable="head")
    assert scalar.crystals.hash != one_class.crystals.hash
    assert is_prepared(second, open_frozen(second, one_class.crystals, tmp_path))


@pytest.mark.parametrize("trainable", ["all", "none"])
def test_a_scalar_not_trained_on_features_needs_no_frozen_backbone(helpers: Any, trainable: str) -> None:
    options = {"epochs": 0} if trainable == "none" else {}
    assert kinds_needed(helpers.small_spec(kind="scalar", trainable=trainable, **options)) == ()
    assert kinds_needed(helpers.small_spec(kind="energy", trainable=trainable, **options)) == ("energies",)
