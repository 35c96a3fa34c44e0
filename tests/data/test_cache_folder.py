"""What lies in the cache folder is told, checked and thrown away."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue.data.cache_folder import prune_caches, stored_caches, verify_graphs
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache, folder_name


@pytest.fixture
def cache_dir(some_crystals, tmp_path: Path) -> Path:
    folder = tmp_path / folder_name(some_crystals)
    some_crystals.save(folder / CRYSTALS_FILE, {"source": "sample"})
    assert GraphCache.build(some_crystals, folder) is not None
    (tmp_path / "0123456789abcdef-0").mkdir()
    frozen = tmp_path / f"frozen-{some_crystals.hash[:16]}-fedcba9876543210"
    frozen.mkdir()
    (frozen / "part.bin").write_bytes(bytes(100))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def by_name(cache_dir: Path) -> dict:
    return {cache.folder.name: cache for cache in stored_caches(cache_dir)}


def test_caches_are_told_with_source_size_and_use(some_crystals, cache_dir):
    caches = by_name(cache_dir)
    assert len(caches) == 3
    graphs = caches[folder_name(some_crystals)]
    assert (graphs.kind, graphs.source, graphs.n_crystals, graphs.current) == ("graphs", "sample", 70, True)
    assert graphs.size == sum(path.stat().st_size for path in graphs.folder.rglob("*") if path.is_file())
    frozen = caches[f"frozen-{some_crystals.hash[:16]}-fedcba9876543210"]
    assert (frozen.kind, frozen.size, frozen.dataset) == ("frozen", 100, some_crystals.hash[:16])
    assert not caches["0123456789abcdef-0"].current


def test_a_folder_that_is_not_there_holds_no_caches(tmp_path):
    assert stored_caches(tmp_path / "none") == []


def test_verifying_finds_a_flipped_bit_and_mends_it_only_when_asked(some_crystals, cache_dir):
    graphs = by_name(cache_dir)[folder_name(some_crystals)]
    assert verify_graphs(graphs) == []
    shard = graphs.folder / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    assert verify_graphs(graphs) == [f"{graphs.folder}: shard 0 is damaged."]
    assert len(verify_graphs(graphs, repair=True)) == 1
    assert verify_graphs(graphs) == []
    shard.unlink()
    assert "There is no file" in verify_graphs(graphs, repair=True)[0]
    assert verify_graphs(graphs) == []


def test_verifying_tells_of_damaged_crystals(some_crystals, cache_dir):
    graphs = by_name(cache_dir)[folder_name(some_crystals)]
    (graphs.folder / CRYSTALS_FILE).write_bytes(b"")
    assert "crystals.bin" in verify_graphs(graphs, repair=True)[0]
    assert by_name(cache_dir)[graphs.folder.name].source == ""


def test_pruning_keeps_what_may_just_be_being_prepared(some_crystals, cache_dir):
    removed = prune_caches(cache_dir, keep_sources=["sample"])
    assert [cache.folder.name for cache in removed] == ["0123456789abcdef-0"], "the frozen ones are of that data, too"
    assert len(prune_caches(cache_dir, keep_sources=["other"])) == 2


def test_pruning_keeps_what_is_in_use_and_what_is_not_its_own(some_crystals, cache_dir):
    removed = prune_caches(cache_dir, keep=[some_crystals.hash])
    assert [cache.folder.name for cache in removed] == ["0123456789abcdef-0"]
    assert len(prune_caches(cache_dir)) == 2
    assert sorted(path.name for path in cache_dir.iterdir()) == ["notes", "notes.txt"]
