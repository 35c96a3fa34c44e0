"""Fixtures that every room shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer
from s3_server import s3  # noqa: F401 - a fixture
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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL, one for each test process; started when the first test asks for it."""
    server = PostgresServer()
    yield server
    server.remove()
