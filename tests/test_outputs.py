"""An output path that would overwrite something else is refused before any computation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mbqueue.errors import UsageError
from mbqueue.outputs import require_writable


def test_a_file_that_is_read_is_never_written_over_whatever_it_is_called(tmp_path: Path) -> None:
    read, link, hard = tmp_path / "data.csv", tmp_path / "link.csv", tmp_path / "hard.csv"
    read.write_text("id,composition\n")
    link.symlink_to(read)
    os.link(read, hard)
    for target in (read, link, hard, tmp_path / "x" / ".." / "data.csv"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="reads it"):
            require_writable(target, force=True, reads=[read], ours=b"id,composition")
    with pytest.raises(UsageError, match="reads it"):
        require_writable(tmp_path / "x" / "new.csv", force=True, reads=[tmp_path / "x"])


def test_a_file_of_another_is_only_written_over_when_that_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "notes.csv"
    require_writable(target, force=False, ours=b"mark")
    target.write_text("my notes")
    with pytest.raises(UsageError, match=r"notes\.csv already exists.*--force"):
        require_writable(target, force=False, ours=b"mark")
    require_writable(target, force=True, ours=b"mark")
    target.write_text("mark, and more")
    require_writable(target, force=False, ours=b"mark")
    with pytest.raises(UsageError, match="--force"):
        require_writable(target, force=False)


def test_a_folder_and_a_file_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        require_writable(tmp_path, force=True)
    with pytest.raises(UsageError, match="no folder"):
        require_writable(tmp_path / "missing" / "x.csv", force=True)
