"""Fixtures that every room shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import ManualClock, RememberedReport

from mbqueue.project import ProjectFolder, init_project


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    """A fresh project folder."""
    return init_project(tmp_path / "project")[0]


@pytest.fixture
def report() -> RememberedReport:
    """A report that remembers what a session told."""
    return RememberedReport()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that moves only when told."""
    return ManualClock()
