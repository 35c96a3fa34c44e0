"""Fixtures of the tests of data/."""

from __future__ import annotations

import numpy as np
import pytest

from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import Dataset, load
from mbqueue.data.graph_cache import GraphCache


@pytest.fixture(scope="session")
def sample() -> Dataset:
    return load("sample")


@pytest.fixture(scope="session")
def some_crystals(sample: Dataset) -> Crystals:
    return sample.crystals.select(np.arange(0, len(sample.crystals), 10))


@pytest.fixture(scope="session")
def some_graphs(some_crystals: Crystals, tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    cache = GraphCache.build(some_crystals, tmp_path_factory.mktemp("graphs"))
    assert cache is not None
    return cache
