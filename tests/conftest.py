"""Fixtures that every room shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue.project import ProjectFolder, init_project


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    """A fresh project folder."""
    return init_project(tmp_path / "project")[0]
