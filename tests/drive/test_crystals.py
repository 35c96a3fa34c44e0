from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest
from small_project import make_project

from mbqueue.data.datasets import SAMPLE_FILE
from mbqueue.experiment import DataSpec
from mbqueue.project import PUBLISHED_CRYSTALS, ProjectFolder
from mbqueue.session.loading import LoadedData, load_data

SOURCE = "mine.jsonl"


@pytest.fixture
def split(tmp_path: Path) -> ProjectFolder:
    """A split project with a dataset of its own beside it."""
    root = make_project(tmp_path / "mount").root
    lines = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (root / SOURCE).write_bytes(b"".join(lines[:12]))
    return ProjectFolder(root, live=tmp_path / "live")


def load(project: ProjectFolder, dataset_hash: str | None, notes: list[str]) -> LoadedData:
    loaded = load_data(
        project,
        DataSpec(dataset=SOURCE),
        seed=0,
        dataset_hash=dataset_hash,
        progress=lambda _what: lambda _done, _total: None,
        note=notes.append,
    )
    assert loaded is not None
    return loaded


def test_a_new_machine_takes_the_crystals_from_the_mount_and_needs_no_source(split: ProjectFolder) -> None:
    notes: list[str] = []
    first = load(split, None, notes)
    assert split.live is not None
    shutil.rmtree(split.live)
    (split.root / SOURCE).unlink()
    again = load(split, first.crystals.hash, notes)
    assert again.crystals.hash == first.crystals.hash
    assert (again.source, again.official, again.dropped) == (first.source, first.official, first.dropped)
    assert notes == []


def test_crystals_that_are_not_whole_on_the_mount_are_read_from_their_source_with_a_note(split: ProjectFolder) -> None:
    first = load(split, None, [])
    (kept,) = (split.root / PUBLISHED_CRYSTALS).iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert split.live is not None
    shutil.rmtree(split.live)
    notes: list[str] = []
    assert load(split, first.crystals.hash, notes).crystals.hash == first.crystals.hash
    assert any("not whole" in note for note in notes)
    # And they are kept again, for the next machine.
    shutil.rmtree(split.live)
    (split.root / SOURCE).unlink()
    assert load(split, first.crystals.hash, []).crystals.hash == first.crystals.hash


def test_the_same_crystals_are_kept_once(split: ProjectFolder) -> None:
    load(split, None, [])
    load(split, None, [])
    assert len(list((split.root / PUBLISHED_CRYSTALS).iterdir())) == 1


def test_a_mount_that_is_gone_costs_a_note_and_no_more(split: ProjectFolder) -> None:
    source = (split.root / SOURCE).read_bytes()
    shutil.rmtree(split.root)
    split.root.mkdir()
    (split.root / SOURCE).write_bytes(source)  # the data are there, the project's folders are not
    notes: list[str] = []
    assert len(load(split, None, notes).crystals) == 12
    assert any("could not be kept" in note for note in notes)


def test_a_project_on_a_local_disk_keeps_no_second_copy(split: ProjectFolder) -> None:
    local = ProjectFolder(split.root)
    load(local, None, [])
    assert not (split.root / PUBLISHED_CRYSTALS).exists()
