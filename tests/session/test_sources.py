"""A source is read once per machine, and again only if something changes that affects the result."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_project import make_project

from mbqueue.data import datasets
from mbqueue.data.datasets import SAMPLE_FILE
from mbqueue.experiment import DataSpec
from mbqueue.project import ProjectFolder
from mbqueue.session import sources
from mbqueue.session.loading import LoadedData, load_data
from mbqueue.session.sources import DataRequest

SOURCE = "mine.jsonl"


@pytest.fixture
def own(tmp_path: Path) -> ProjectFolder:
    """A project with twelve crystals in a file."""
    project = make_project(tmp_path)
    lines = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (project.root / SOURCE).write_bytes(b"".join(lines[:12]))
    return project


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which dataset sources are read, in order."""
    told: list[str] = []
    real: Callable[..., Any] = datasets.load

    def counted(name: str, **options: Any) -> Any:
        told.append(name)
        return real(name, **options)

    monkeypatch.setattr(datasets, "load", counted)
    return told


def load(project: ProjectFolder, **options: Any) -> LoadedData:
    seed, note = options.pop("seed", 0), options.pop("note", lambda _note: None)
    loaded = load_data(
        project,
        DataRequest(data=DataSpec(dataset=SOURCE, **options), seed=seed),
        dataset_hash=None,
        progress=lambda _what: lambda _done, _total: None,
        note=note,
    )
    assert loaded is not None
    return loaded


def test_a_source_that_did_not_change_is_read_once(own: ProjectFolder, reads: list[str]) -> None:
    first = load(own)
    os.utime(own.root / SOURCE, (1.0, 1.0))
    again = load(own)
    assert reads == [SOURCE]
    assert again.crystals.hash == first.crystals.hash
    assert (again.source, again.official, again.dropped) == (first.source, first.official, first.dropped)


def test_the_chosen_columns_are_also_printed_when_the_crystals_come_from_the_cache(own: ProjectFolder) -> None:
    notes: list[list[str]] = [[], []]
    for told in notes:
        load(own, note=told.append)
    assert notes[0] == notes[1]
    assert "target: e_form, 12 values from" in notes[1][0]


def test_new_content_of_the_same_size_and_time_is_read(own: ProjectFolder, reads: list[str]) -> None:
    path = own.root / SOURCE
    first = load(own)
    before, content = path.stat(), path.read_bytes()
    place = content.index(b'"e_form":') + len(b'"e_form":') + 3
    digit = b"1" if content[place : place + 1] != b"1" else b"2"
    path.write_bytes(content[:place] + digit + content[place + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load(own).crystals.hash != first.crystals.hash
    assert len(reads) == 2


def test_other_limits_and_seeds_are_read_again_and_remembered_separately(own: ProjectFolder, reads: list[str]) -> None:
    hashes = [load(own, **options).crystals.hash for options in ({}, {"limit": 8}, {"limit": 8, "seed": 1}) * 2]
    assert len(reads) == 3
    assert hashes[:3] == hashes[3:]
    assert len(set(hashes)) == 3


def test_another_version_of_the_reader_reads_again(
    own: ProjectFolder, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(own)
    monkeypatch.setattr(sources, "reader_version", lambda: "the next")
    load(own)
    assert len(reads) == 2


def test_damaged_or_missing_crystals_are_read_again(own: ProjectFolder, reads: list[str]) -> None:
    first = load(own)
    file = first.graphs.folder / "crystals.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert load(own).crystals.hash == first.crystals.hash
    file.unlink()
    assert load(own).crystals.hash == first.crystals.hash
    assert len(reads) == 3
