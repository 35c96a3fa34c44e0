from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_project import enqueue, make_project, small_spec

from mbqueue import Project
from mbqueue.data.cache_folder import prune_caches
from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import SAMPLE_FILE
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache
from mbqueue.errors import CacheError, UsageError
from mbqueue.experiment import DataSpec
from mbqueue.project import PUBLISHED_CRYSTALS, ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.session.loading import LoadedData, load_data
from mbqueue.session.sources import DataRequest

SOURCE = "mine.jsonl"


@pytest.fixture
def split(tmp_path: Path) -> ProjectFolder:
    """A split project, with a dataset in the project's folder."""
    root = make_project(tmp_path / "mount").root
    lines = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (root / SOURCE).write_bytes(b"".join(lines[:12]))
    return ProjectFolder(root, live=tmp_path / "live")


def load(project: ProjectFolder, dataset_hash: str | None, notes: list[str]) -> LoadedData:
    loaded = load_data(
        project,
        DataRequest(data=DataSpec(dataset=SOURCE)),
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
    assert [note for note in notes if not note.startswith("target: ")] == []


def test_crystals_damaged_here_are_copied_from_the_mount(split: ProjectFolder) -> None:
    first = load(split, None, [])
    (split.root / SOURCE).unlink()
    file = first.graphs.folder / CRYSTALS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    notes: list[str] = []
    assert load(split, first.crystals.hash, notes).crystals.hash == first.crystals.hash
    (note,) = notes
    assert "crystals.bin" in note
    assert Crystals.open(file)[0].hash == first.crystals.hash


def test_prepare_on_a_new_machine_takes_the_crystals_that_an_experiment_was_prepared_with(
    split: ProjectFolder, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(split, None, [])
    enqueue(split, small_spec(split, data__dataset=SOURCE, data__limit=0, seed=7))
    with open_queue(split) as queue:
        session = queue.start_session(device="cpu", now=1.0, alive_seconds=100.0)
        lease = queue.claim(session, now=1.0, lease_seconds=100.0)
        assert lease is not None
        queue.commit(lease, result={"dataset_hash": first.crystals.hash}, now=2.0)
    shutil.rmtree(split.cache_dir)
    source = (split.root / SOURCE).read_bytes()
    project = Project.__new__(Project)
    project.folder = split
    (split.root / SOURCE).unlink()
    assert project.prepare(DataSpec(dataset=SOURCE)).crystals.hash == first.crystals.hash
    assert "not on this machine" in caplog.text
    with pytest.raises(UsageError, match="There is no dataset"):
        project.prepare(DataSpec(dataset=SOURCE, limit=8))
    # Shorten the dataset, so that the number of crystals shows whether `prepare` reads the new file.
    (split.root / SOURCE).write_bytes(b"".join(source.splitlines(keepends=True)[:10]))
    assert len(project.prepare(DataSpec(dataset=SOURCE)).crystals) == 10


def test_emptying_a_cache_while_it_is_built_is_an_error(split: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    build = GraphCache.build

    def emptied(crystals: Crystals, folder: Path, **options: Any) -> GraphCache | None:
        graphs = build(crystals, folder, **options)
        (folder / CRYSTALS_FILE).unlink()
        return graphs

    monkeypatch.setattr(GraphCache, "build", emptied)
    with pytest.raises(CacheError, match="while it was being built"):
        load(split, None, [])


def test_a_cache_cannot_be_pruned_while_it_is_built(split: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    build = GraphCache.build
    told: list[str] = []

    def pruned(crystals: Crystals, folder: Path, **options: Any) -> GraphCache | None:
        assert prune_caches(split.cache_dir, note=told.append) == []
        return build(crystals, folder, **options)

    monkeypatch.setattr(GraphCache, "build", pruned)
    loaded = load(split, None, [])
    assert (loaded.graphs.folder / CRYSTALS_FILE).exists()
    assert "it is being built" in told[0]


def test_incomplete_crystals_on_the_mount_are_read_from_their_source_with_a_note(split: ProjectFolder) -> None:
    first = load(split, None, [])
    (kept,) = (split.root / PUBLISHED_CRYSTALS).iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert split.live is not None
    shutil.rmtree(split.live)
    notes: list[str] = []
    assert load(split, first.crystals.hash, notes).crystals.hash == first.crystals.hash
    assert any("is incomplete" in note for note in notes)
    # The last `load` stored the crystals on the drive again, so a new machine needs no dataset.
    shutil.rmtree(split.live)
    (split.root / SOURCE).unlink()
    assert load(split, first.crystals.hash, []).crystals.hash == first.crystals.hash


def test_equal_crystals_are_stored_once(split: ProjectFolder) -> None:
    load(split, None, [])
    load(split, None, [])
    assert len(list((split.root / PUBLISHED_CRYSTALS).iterdir())) == 1


def test_a_lost_mount_only_causes_a_note(split: ProjectFolder) -> None:
    source = (split.root / SOURCE).read_bytes()
    shutil.rmtree(split.root)
    split.root.mkdir()
    (split.root / SOURCE).write_bytes(source)  # put only the dataset on the drive, without the project's folders
    notes: list[str] = []
    assert len(load(split, None, notes).crystals) == 12
    assert any("could not be copied" in note for note in notes)


def test_a_project_on_a_local_disk_stores_no_second_copy(split: ProjectFolder) -> None:
    local = ProjectFolder(split.root)
    load(local, None, [])
    assert not (split.root / PUBLISHED_CRYSTALS).exists()
