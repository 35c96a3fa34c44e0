"""The graph cache survives damage, full disks, and killed or concurrent sessions."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mbqueue.data import graph_cache as cache_module
from mbqueue.data.batches import make_batch
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import GraphCache, folder_name, shard_borders
from mbqueue.errors import CacheError
from mbqueue.files import TEMP_PREFIX


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_CRYSTALS", 10)


@pytest.fixture
def crystals(some_crystals: Crystals) -> Crystals:
    assert len(shard_borders(some_crystals.atom_offsets)) == 8
    return some_crystals


def build(crystals: Crystals, folder: Path, **options) -> GraphCache:
    cache = GraphCache.build(crystals, folder, **options)
    assert cache is not None
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.bin"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards(folder)}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in shards(folder)}


def assert_same_batches(one: GraphCache, other: GraphCache) -> None:
    rows = np.arange(len(one))
    ours, theirs = make_batch(one, rows), make_batch(other, rows)
    for name in vars(ours):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def test_shards_are_cut_by_crystals_and_by_atoms(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_CRYSTALS", 3)
    monkeypatch.setattr(cache_module, "SHARD_ATOMS", 10)
    sizes = [4, 4, 4, 25, 1, 1, 1, 1, 10, 1]
    assert shard_borders(np.cumsum([0, *sizes])) == [0, 2, 3, 4, 7, 8, 9, 10]
    assert shard_borders(np.zeros(1, np.int64)) == [0]


def test_an_opened_cache_equals_the_built_one(crystals, tmp_path):
    built = build(crystals, tmp_path)
    opened = GraphCache.open(crystals, tmp_path)
    assert_same_batches(built, opened)
    np.testing.assert_array_equal(opened.bond_counts(), built.bond_counts())
    assert opened.angle_counts().sum() == len(make_batch(opened, np.arange(len(crystals))).angle)
    assert opened.damaged() == []


def test_the_written_bytes_do_not_depend_on_the_number_of_workers(crystals, tmp_path):
    build(crystals, tmp_path / "one", workers=1)
    build(crystals, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_a_second_build_makes_nothing_again(crystals, tmp_path):
    build(crystals, tmp_path)
    before = times(tmp_path)
    told = []
    build(crystals, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert times(tmp_path) == before
    assert told == []


def test_a_build_of_missing_shards_counts_from_those_that_exist(crystals, tmp_path):
    build(crystals, tmp_path)
    for missing in shards(tmp_path)[2:4]:
        missing.unlink()
    told = []
    build(crystals, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(50, 70), (60, 70), (70, 70)]


def test_progress_counts_every_crystal_once(crystals, tmp_path):
    told = []
    build(crystals, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 70) for done in range(0, 80, 10)]


def test_a_stopped_build_resumes(crystals, tmp_path):
    asked = []

    def stop_after_three() -> bool:
        asked.append(1)
        return len(asked) > 3

    assert GraphCache.build(crystals, tmp_path, should_stop=stop_after_three, workers=1) is None
    made = times(tmp_path)
    assert len(made) == 3
    with pytest.raises(CacheError, match="There is no file"):
        GraphCache.open(crystals, tmp_path)
    build(crystals, tmp_path)
    assert len(shards(tmp_path)) == 7
    assert made.items() <= times(tmp_path).items()


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "index", "gone", "other"])
def test_a_damaged_shard_is_found_on_opening_and_rebuilt_alone(crystals, tmp_path, damage):
    build(crystals, tmp_path)
    whole, before = contents(tmp_path), times(tmp_path)
    bad = shards(tmp_path)[4]
    match damage:
        case "cut":
            bad.write_bytes(bad.read_bytes()[:-1000])
        case "empty":
            bad.write_bytes(b"")
        case "header":
            flip(bad, 100)
        case "index":
            flip(bad, 1500)
        case "gone":
            bad.unlink()
        case "other":
            bad.write_bytes(shards(tmp_path)[5].read_bytes())
    with pytest.raises(CacheError, match=bad.name):
        GraphCache.open(crystals, tmp_path)
    build(crystals, tmp_path)
    assert contents(tmp_path) == whole
    assert {name for name, when in times(tmp_path).items() if when != before[name]} == {bad.name}


def test_a_flipped_bit_in_the_graphs_is_noticed_in_reading_and_mended(crystals, tmp_path):
    reference = build(crystals, tmp_path / "reference")
    build(crystals, tmp_path / "cache")
    bad = shards(tmp_path / "cache")[2]
    flip(bad, bad.stat().st_size // 2)
    cache = GraphCache.open(crystals, tmp_path / "cache")
    assert cache.damaged() == [2]
    assert_same_batches(cache, reference)
    assert cache.damaged() == []
    assert contents(tmp_path / "cache") == contents(tmp_path / "reference")


@pytest.mark.parametrize("change", ["cut-offs", "version", "crystals"])
def test_a_cache_of_something_else_is_not_used(crystals, tmp_path, monkeypatch, change):
    build(crystals, tmp_path)
    if change == "cut-offs":
        monkeypatch.setattr(cache_module, "ATOM_CUTOFF", 5.0)
        monkeypatch.setattr(cache_module, "convert", partial(cache_module.convert, atom_cutoff=5.0))
    elif change == "version":
        monkeypatch.setattr(cache_module, "CONVERTER_VERSION", 10**6)
    else:
        crystals = crystals.select(np.arange(len(crystals))[::-1])
    with pytest.raises(CacheError, match="contains different graphs"):
        GraphCache.open(crystals, tmp_path)
    rebuilt = build(crystals, tmp_path)
    assert_same_batches(rebuilt, build(crystals, tmp_path / "fresh"))


def test_the_name_of_the_folder_tells_crystals_and_version(crystals):
    assert folder_name(crystals) == f"{crystals.hash[:16]}-{cache_module.CONVERTER_VERSION}"


def test_a_temp_file_of_a_dead_builder_is_swept_away(crystals, tmp_path):
    (tmp_path / f"{TEMP_PREFIX}0123456789ab-shard-00003.bin").write_bytes(b"half a shard")
    build(crystals, tmp_path)
    assert not list(tmp_path.glob(f"{TEMP_PREFIX}*"))
    assert list(tmp_path.glob("shard-*.bin"))


CHILD = """
import sys, time
from pathlib import Path
from mbqueue.data import graph_cache as cache
from mbqueue.data.crystals import Crystals

convert = cache.convert

def slow(*arguments, **options):
    print("converting", flush=True)
    time.sleep(float(sys.argv[3]))
    return convert(*arguments, **options)

cache.SHARD_CRYSTALS = 10
cache.convert = slow
cache.GraphCache.build(Crystals.open(Path(sys.argv[1]))[0], Path(sys.argv[2]), workers=1)
"""


@pytest.fixture
def start_builder(crystals, tmp_path) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Start another process that builds tmp_path/cache; return once it holds the lock of its first shard."""
    crystals.save(tmp_path / "crystals.bin")
    children: list[subprocess.Popen[str]] = []

    def start(seconds_per_shard: float) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "crystals.bin"), str(tmp_path / "cache"), str(seconds_per_shard)]
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "converting\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def test_two_processes_build_one_cache_together(crystals, tmp_path, start_builder):
    child = start_builder(0.05)
    ours = build(crystals, tmp_path / "cache")
    made_by_child = 1 + child.communicate()[0].count("converting")
    assert child.returncode == 0
    assert made_by_child < 7, "the other process found shards of ours"
    assert_same_batches(ours, build(crystals, tmp_path / "alone"))
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_a_builder_that_is_killed_does_not_block_others(crystals, tmp_path, start_builder):
    child = start_builder(3600)
    child.kill()
    child.wait()
    ours = build(crystals, tmp_path / "cache")
    assert_same_batches(ours, build(crystals, tmp_path / "alone"))


def test_crystals_of_an_isolated_atom_are_counted(tmp_path):
    from pymatgen.core import Lattice, Structure

    from tests.data.crystal_making import SALT, gathered

    lonely = Structure(Lattice.cubic(9.3), ["Cs"], [[0, 0, 0]])
    cache = build(gathered(SALT, lonely, SALT), tmp_path)
    assert cache.widened().tolist() == [1]
    assert GraphCache.open(cache.crystals, tmp_path).cutoffs.tolist() == [6.0, 9.5, 6.0]


def test_a_full_disk_is_reported_and_finished_shards_stay(crystals, tmp_path, monkeypatch):
    write = cache_module.write_arrays

    def full(path, *arguments, **options):
        if path.name == "shard-00003.bin":
            raise OSError(28, "No space left on device")
        write(path, *arguments, **options)

    monkeypatch.setattr(cache_module, "write_arrays", full)
    with pytest.raises(CacheError, match=r"shard-00003\.bin cannot be written.*No space left"):
        build(crystals, tmp_path, workers=1)
    made = times(tmp_path)
    assert {"shard-00000.bin", "shard-00001.bin", "shard-00002.bin"} <= made.keys()
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "SHARD_CRYSTALS", 10)
    build(crystals, tmp_path)
    assert made.items() <= times(tmp_path).items()


def with_other_targets(crystals):
    return dataclasses.replace(crystals, targets=crystals.targets + 1.0)


def test_graphs_of_the_same_structures_with_other_targets_are_one_file(crystals, tmp_path, monkeypatch):
    other = with_other_targets(crystals)
    folder, twin = tmp_path / folder_name(crystals), tmp_path / folder_name(other)
    build(crystals, folder)
    monkeypatch.setattr(cache_module, "convert", lambda *_args, **_options: pytest.fail("converted again"))
    build(other, twin)
    assert [path.stat().st_ino for path in shards(twin)] == [path.stat().st_ino for path in shards(folder)]


def test_a_damaged_shard_is_not_taken_from_another_dataset_that_has_the_same_damage(crystals, tmp_path):
    other = with_other_targets(crystals)
    whole = contents(build(crystals, tmp_path / folder_name(crystals)).folder)
    twin = tmp_path / folder_name(other)
    build(other, twin)
    flip(shards(twin)[2], shards(twin)[2].stat().st_size // 2)
    cache = GraphCache.open(other, twin)
    assert cache.damaged() == [2]
    cache.repair(2)
    assert contents(twin) == whole


def test_shards_of_an_earlier_version_are_used(crystals, tmp_path, monkeypatch):
    key = GraphCache._key
    with monkeypatch.context() as earlier:
        earlier.setattr(GraphCache, "_key", lambda self, number: {**key(self, number), "crystals": self.crystals.hash})
        build(crystals, tmp_path)
    before = times(tmp_path)
    build(crystals, tmp_path)
    assert times(tmp_path) == before
