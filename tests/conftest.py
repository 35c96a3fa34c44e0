"""Fixtures that all test folders share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
from postgres_server import PostgresServer
from s3_server import s3  # noqa: F401 - a fixture
from small_project import ManualClock, RememberedReport

from mbqueue import families
from mbqueue.project import ProjectFolder, init_project

#: A file system in memory, and the free bytes that the temporary folders of a test run need.
MEMORY, MEMORY_BYTES = Path("/dev/shm"), 4 * 1024**3


def pytest_configure() -> None:
    """Put the temporary folders in memory if there is room, because on a disk, tests wait for thousands of fsyncs."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < MEMORY_BYTES:
        return
    if not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:  # some tests run programs in their folders
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="session", autouse=True)
def _caches_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make commands write their caches and notes below a temporary folder instead of `~/.cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(autouse=True)
def _no_session_is_left() -> Iterator[None]:
    """End any stepped sessions that a test has left paused, without importing PyTorch if there are none."""
    yield
    if "stepped_session" in sys.modules:
        sys.modules["stepped_session"].end_all()


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules with stepped sessions, allow specs to use the tiny model, which such sessions train."""
    with ExitStack() as stack:
        if any(getattr(value, "__module__", "") == "stepped_session" for value in vars(request.module).values()):
            known = (*families.FAMILIES, sys.modules["tiny_family"].FAMILY)
            stack.enter_context(mock.patch.object(families, "FAMILIES", known))
        yield


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    """A fresh project folder."""
    return init_project(tmp_path / "project")[0]


@pytest.fixture
def report() -> RememberedReport:
    """A report that remembers the events of a session."""
    return RememberedReport()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that only the test advances."""
    return ManualClock()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL server for each test process, started when the first test asks for it."""
    server = PostgresServer()
    yield server
    server.remove()
