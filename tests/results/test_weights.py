"""How the weights of blends are fitted."""

from __future__ import annotations

import numpy as np
import pytest

from mbqueue.results.weights import fitted_weights


def test_the_weights_are_those_of_the_smallest_mean_absolute_error():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=200)
    each = {"a": targets + rng.laplace(0, 0.1, 200), "b": targets + rng.laplace(0, 0.2, 200), "c": rng.normal(size=200)}
    weights = fitted_weights(each, targets, is_class=False)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0
    assert weights["a"] > weights["b"] > weights["c"]

    def error(shares):
        return np.abs(sum(share * each[name] for name, share in zip(each, shares, strict=True)) - targets).mean()

    best = error(weights.values())
    assert all(best <= error(shares) + 1e-12 for shares in rng.dirichlet(np.ones(3), 500))
    assert best < min(np.abs(one - targets).mean() for one in each.values())


def test_no_weight_is_negative_where_that_would_fit_better():
    targets = np.linspace(-1, 1, 50)
    weights = fitted_weights({"a": 1.5 * targets, "b": 2 * targets}, targets, is_class=False)
    assert weights == {"a": 1.0, "b": 0.0}


def test_of_a_class_the_weights_are_those_of_the_smallest_log_loss():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 300).astype(float)
    sure = np.clip(0.8 * targets + 0.1 + rng.normal(0, 0.1, 300), 0.01, 0.99)
    each = {"unsure": np.full(300, 0.5), "sure": sure, "wrong": 1 - sure}
    weights = fitted_weights(each, targets, is_class=True)
    assert weights["sure"] == pytest.approx(1, abs=1e-4)

    def log_loss(shares):
        blend = sum(share * each[name] for name, share in zip(each, shares, strict=True))
        return -np.log(np.where(targets == 1, blend, 1 - blend)).mean()

    best = log_loss(weights.values())
    assert all(best <= log_loss(shares) + 1e-9 for shares in rng.dirichlet(np.ones(3), 300))
