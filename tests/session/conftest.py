"""Fixtures of the session tests."""

from __future__ import annotations

import pytest
from small_project import ManualClock, RememberedReport


@pytest.fixture
def report() -> RememberedReport:
    return RememberedReport()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
