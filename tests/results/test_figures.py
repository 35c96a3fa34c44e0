"""Axis labels and markers of the figures, for few or many points and for narrow or wide ranges."""

from __future__ import annotations

import numpy as np
import pytest

from mbqueue.results.folder import read_recorded
from mbqueue.results.report import figures
from mbqueue.results.report.page import draw
from mbqueue.task import FORMATION_ENERGY


def curves(*maes):
    return {0: [{"epoch": i, "val_mae": mae, "train_mae": mae, "lr": 1e-3} for i, mae in enumerate(maes, 1)]}


def ticks(*maes):
    return figures.learning_curves(curves(*maes), FORMATION_ENERGY.target).layout.yaxis.tickvals


@pytest.mark.parametrize("maes", [(0.1, 0.03), (0.5, 1e-6), (3e4, 1e-3), (1e-12, 5.0)])
def test_the_labels_of_a_learning_curve_cover_it_and_are_no_more_than_can_be_read(maes):
    named = ticks(*maes)
    assert min(named) <= min(maes)
    assert sum(min(maes) / 2 <= tick <= max(maes) * 2 for tick in named) in range(2, 13)


def test_over_less_than_a_decade_round_numbers_between_powers_of_ten_are_named():
    assert {0.03, 0.05, 0.07} <= set(ticks(0.1, 0.03))


def test_a_curve_without_finite_values_has_no_labels():
    assert ticks(float("nan"), float("nan")) is None


def test_few_crystals_are_points_with_their_ids(predictions):
    few = predictions(200)
    points = figures.parity(few, FORMATION_ENERGY.target).data[0]
    assert points.type == "scatter"
    assert few.ids[7] in points.text[7]
    assert (points.x[7], points.y[7]) == pytest.approx((few.y_true[7], few.y_pred[7]), abs=1e-5)


def test_many_crystals_are_a_density(predictions):
    assert figures.parity(predictions(5000), FORMATION_ENERGY.target).data[0].type == "heatmap"


@pytest.mark.parametrize(
    ("largest", "named"),
    [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7]), (60, [1, 2, 5, 10, 20, 60]), (2500, [1, 10, 100, 1000, 2500])],
)
def test_the_colours_of_a_density_are_named_up_to_the_largest_count(largest, named):
    counts = np.array([[largest, 0], [1, 1]])
    density = figures.Density(np.array([0.0, 1.0, 2.0]), counts)
    assert list(figures._density(density).colorbar.ticktext) == [f"{count:,}" for count in named]


def test_a_report_of_few_crystals_draws_points(recorded_folder):
    assert draw(read_recorded(recorded_folder))["parity"].data[0].type == "scatter"
