"""Comparisons in the terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mbqueue.dashboard.comparison import ComparisonView
from mbqueue.results.compare import Comparison, PairedDifference
from mbqueue.results.folder import Recorded


def recorded(name, maes, reasons=(), *, official=True, dataset="matbench_mp_e_form"):
    content = {
        "experiment": name,
        "spec": {"model": {"pretrained": "0.3.0", "trainable": "all"}},
        "dataset": {"official": official, "name": dataset},
        "folds": {str(fold): {"scores": {"mae": mae}} for fold, mae in maes.items()},
        "summary": {"mae": {"mean": float(np.mean(list(maes.values()))), "std": 0.0004}},
        "leaderboard": {"rows": [{"name": "coGN", "mae": 0.017}], "reasons_against": list(reasons)},
    }
    return Recorded(Path(name), content)


@pytest.fixture
def comparison():
    pair = PairedDifference(
        a="first", b="second", n=100, mae_a=0.02, mae_b=0.019, mean=-0.001, low=-0.0015, high=-0.0005,
        share_better=0.6, per_fold={0: -0.001},
    )  # fmt: skip
    both = (
        recorded("first", {0: 0.02, 1: 0.03}, ["folds 2, 3, 4 are missing"]),
        recorded("second", {0: 0.01}),
    )
    return Comparison(recorded=both, labels=("first", "second"), pairs=(pair,))


def draw(comparison, encoding="utf-8", width=80):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    Console(file=stream, width=width).print(ComparisonView(comparison))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_experiments_and_leaderboard_are_listed_best_first(comparison):
    lines = draw(comparison).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["second", "coGN", "first"]
    assert lines[3].split() == ["first", "0.0200", "0.0300", "–", "–", "–", "0.0250", "±", "0.0004"]


def test_crystals_that_are_not_a_whole_matbench_dataset_are_not_ranked_with_the_leaderboard(comparison):
    own = recorded("second", {0: 0.01}, ["the crystals are not from the official file"], official=False)
    for both in ((own, own), (comparison.recorded[0], own), (own, comparison.recorded[0])):
        drawn = draw(dataclasses.replace(comparison, recorded=both), width=120)
        assert "coGN" not in drawn
        assert "cannot be compared with the leaderboard: the crystals" in drawn


def test_what_is_known_about_the_overlap_with_pretraining_is_shown_once(comparison):
    assert " ".join(draw(comparison).split()).count("has seen most crystals") == 1
    other = recorded("second", {0: 0.01}, dataset="mine.csv")
    drawn = " ".join(draw(dataclasses.replace(comparison, recorded=(comparison.recorded[0], other))).split())
    assert "first: CHGNet was pretrained on MPtrj" in drawn
    assert "second: CHGNet was pretrained on MPtrj" in drawn
    assert drawn.count("has seen most crystals") == drawn.count("may have seen many of these crystals") == 1


@pytest.mark.parametrize("width", [40, 60, 70, 80])
def test_a_long_name_takes_no_digit_from_a_number(comparison, width):
    long = dataclasses.replace(comparison, labels=("n" * 64, "second"))
    drawn = draw(long, width=width)
    assert "…" not in drawn
    assert "0.0250 ± 0.0004" in drawn
    assert drawn.replace("\n", "").replace(" ", "").count("n" * 12) >= 1
    if width >= 70:
        assert "0.0200" in drawn


def test_the_pair_is_shown_with_its_interval_and_verdict(comparison):
    drawn = draw(comparison)
    assert "second against first on 100 crystals in common: second is better" in drawn
    assert "95% interval -0.00150 to -0.00050" in drawn


def test_a_score_that_does_not_compare_with_the_leaderboard_says_why(comparison):
    assert "first cannot be compared with the leaderboard: folds 2, 3, 4" in draw(comparison)


def test_a_comparison_on_own_crystals_does_not_mention_the_leaderboard(comparison):
    own = recorded("second", {0: 0.01}, ["the crystals are not from"], official=False, dataset="mine.csv")
    assert "leaderboard" not in draw(dataclasses.replace(comparison, recorded=(own, own)))


def test_too_few_crystals_for_an_interval_are_reported(comparison):
    few = dataclasses.replace(comparison.pairs[0], n=1, low=None, high=None)
    drawn = draw(dataclasses.replace(comparison, pairs=(few,)))
    assert "too few crystals in common to tell" in drawn
    assert "interval" not in drawn


def test_ascii_outputs_get_ascii(comparison):
    assert draw(comparison, encoding="ascii").isascii()
