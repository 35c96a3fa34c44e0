"""List, check and remove the content of the cache folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mbqueue.data import graph_cache
from mbqueue.data.cache_folder import Verdict, prune_caches, stored_caches, verify_graphs
from mbqueue.data.cache_lock import building, removing
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


def test_caches_are_listed_with_source_size_and_use(some_crystals, cache_dir):
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
    assert verify_graphs(graphs) == Verdict(wrong=[], left=[])
    shard = graphs.folder / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    wrong = [f"{graphs.folder}: shard 0 is damaged."]
    assert verify_graphs(graphs) == Verdict(wrong=wrong, left=wrong)
    assert verify_graphs(graphs, repair=True) == Verdict(wrong=wrong, left=[])
    assert verify_graphs(graphs) == Verdict(wrong=[], left=[])
    shard.write_bytes(shard.read_bytes()[:-1])
    repaired = verify_graphs(graphs, repair=True)
    assert "instead of" in repaired.wrong[0]
    assert repaired.left == []


def test_a_cache_with_shards_to_make_is_unfinished_and_not_damaged(some_crystals, cache_dir, monkeypatch):
    monkeypatch.setattr(graph_cache, "SHARD_CRYSTALS", 10)
    folder = cache_dir / folder_name(some_crystals)
    assert GraphCache.build(some_crystals, folder) is not None
    for number in (0, 3, 6):
        (folder / f"shard-{number:05d}.bin").unlink()
    graphs = by_name(cache_dir)[folder.name]
    assert graphs.how_far == "unfinished, 4 of 7 shards; run mbqueue prepare to continue"
    assert verify_graphs(graphs) == Verdict(wrong=[], left=[])
    assert verify_graphs(graphs, repair=True) == Verdict(wrong=[], left=[])
    assert not by_name(cache_dir)[folder.name].is_unfinished


def test_verifying_reports_damaged_crystals_which_it_cannot_repair(some_crystals, cache_dir):
    graphs = by_name(cache_dir)[folder_name(some_crystals)]
    (graphs.folder / CRYSTALS_FILE).write_bytes(b"")
    verdict = verify_graphs(graphs, repair=True)
    assert "crystals.bin" in verdict.left[0]
    assert "Run mbqueue prepare" in verdict.left[0]
    assert by_name(cache_dir)[graphs.folder.name].source == ""


def test_pruning_leaves_a_cache_alone_that_is_being_built_and_says_so(some_crystals, cache_dir):
    folder = cache_dir / folder_name(some_crystals)
    before = sorted(folder.rglob("*"))
    told: list[str] = []
    with building(folder), building(folder):
        removed = prune_caches(cache_dir, note=told.append)
    assert folder not in [cache.folder for cache in removed]
    assert told == [f"{folder.name} is kept, because it is being built."]
    assert sorted(folder.rglob("*")) == before
    assert [cache.folder for cache in prune_caches(cache_dir)] == [folder]


def test_a_builder_waits_until_its_folder_is_removed(tmp_path):
    begun, built = threading.Event(), threading.Event()

    def build() -> None:
        begun.set()
        with building(tmp_path / "cache"):
            built.set()

    with removing(tmp_path / "cache") as is_alone:
        assert is_alone
        builder = threading.Thread(target=build)
        builder.start()
        assert begun.wait(60)
        assert not built.is_set()
    assert built.wait(60)
    builder.join()


def test_the_lock_of_a_builder_that_was_killed_does_not_block_others(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from mbqueue.data.cache_lock import building\n"
        "with building(Path(sys.argv[1])): print('building', flush=True); time.sleep(3600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    with removing(tmp_path / "cache") as is_alone:
        assert not is_alone
    child.kill()
    child.wait()
    child.stdout.close()
    with removing(tmp_path / "cache") as is_alone:
        assert is_alone


def test_pruning_keeps_data_that_may_be_in_preparation(some_crystals, cache_dir):
    removed = prune_caches(cache_dir, keep_sources=["sample"])
    assert [cache.folder.name for cache in removed] == ["0123456789abcdef-0"], "the frozen ones are of that data, too"
    assert len(prune_caches(cache_dir, keep_sources=["other"])) == 2


def test_pruning_keeps_data_in_use_and_files_of_others(some_crystals, cache_dir):
    removed = prune_caches(cache_dir, keep=[some_crystals.hash])
    assert [cache.folder.name for cache in removed] == ["0123456789abcdef-0"]
    assert len(prune_caches(cache_dir)) == 2
    assert sorted(path.name for path in cache_dir.iterdir()) == ["locks", "notes", "notes.txt"]


def test_features_of_the_same_structures_stay_with_their_crystals_and_go_with_them(some_crystals, cache_dir):
    frozen = cache_dir / f"frozen-{some_crystals.structures_hash[:16]}-fedcba9876543210"
    frozen.mkdir()
    prune_caches(cache_dir, keep={some_crystals.hash})
    assert frozen.is_dir()
    prune_caches(cache_dir)
    assert not frozen.exists()


def test_features_stay_while_the_crystals_that_need_them_are_not_here(some_crystals, cache_dir):
    shutil.rmtree(cache_dir / folder_name(some_crystals))
    frozen = cache_dir / f"frozen-{some_crystals.structures_hash[:16]}-fedcba9876543210"
    frozen.mkdir()
    prune_caches(cache_dir, keep={some_crystals.hash})
    assert frozen.is_dir()
