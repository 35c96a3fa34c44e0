"""Listings of result files, and which copies of the files are accepted (`mbqueue.storage.results`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue.storage.blobs import Folder
from mbqueue.storage.results import ResultFile


@pytest.fixture
def written(tmp_path: Path) -> ResultFile:
    (tmp_path / "preds_fold_0.csv").write_bytes(b"id,y\na,1\n")
    return ResultFile.of(tmp_path / "preds_fold_0.csv")


@pytest.mark.parametrize("content", [b"", b"id,y\na,1", b"id,y\na,2\n", b"id,y\na,1\n\n"])
def test_a_copy_that_is_cut_off_changed_or_longer_is_not_read(
    tmp_path: Path, written: ResultFile, content: bytes
) -> None:
    place = Folder(tmp_path / "place")
    place.put("results/file", b"id,y\na,1\n")
    assert written.read(place, "results/file") == b"id,y\na,1\n"
    place.put("results/file", content)
    with pytest.raises(FileNotFoundError):
        written.read(place, "results/file")


def test_a_file_that_changed_after_its_job_is_not_uploaded(tmp_path: Path, written: ResultFile) -> None:
    assert written.written_in(tmp_path) == b"id,y\na,1\n"
    (tmp_path / written.name).write_bytes(b"id,y\na,2\n")
    with pytest.raises(OSError, match="changed after its job wrote it"):
        written.written_in(tmp_path)


def test_a_local_file_is_complete_if_it_has_the_written_bytes(tmp_path: Path, written: ResultFile) -> None:
    path = tmp_path / written.name
    assert written.is_whole(path)
    path.write_bytes(b"id,y\na,2\n")
    assert not written.is_whole(path)
    path.unlink()
    assert not written.is_whole(path)


@pytest.mark.parametrize("name", ["../preds.csv", "/etc/passwd", ".hidden", "", "a/b", "a\n", "x" * 129])
def test_a_listed_name_that_could_lead_out_of_the_folder_is_left_out(name: str) -> None:
    checksum = {"size": 1, "sha256": "0" * 64}
    assert [file.name for file in ResultFile.all_in({name: checksum, "RESULTS.md": checksum})] == ["RESULTS.md"]


def test_a_file_with_other_content_gets_another_hashed_name(tmp_path: Path, written: ResultFile) -> None:
    (tmp_path / written.name).write_bytes(b"other")
    other = ResultFile.of(tmp_path / written.name)
    assert other.stored_name != written.stored_name
    assert other.stored_name.endswith(written.name)
