"""List, verify and remove the caches of a project. Every cache can be rebuilt."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mbqueue.data.cache_lock import building, removing
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache, count_shards
from mbqueue.data.graphs import CONVERTER_VERSION
from mbqueue.errors import CacheError, counted

_NAME = re.compile(r"(?P<frozen>frozen-)?(?P<dataset>[0-9a-f]{16})-(?P<version>\w+)")


@dataclass(frozen=True, kw_only=True)
class StoredCache:
    """One cache: a subfolder of the project's cache folder.

    Attributes:
        kind: "graphs" (crystals and their graphs) or "frozen" (a frozen backbone's outputs for them).
        dataset: first 16 characters of the dataset hash or, for some frozen backbones, of the structures' hash.
        structures: for graphs, first 16 characters of the structures' hash; otherwise empty.
        current: whether this mbqueue can use the cache; False if a different version of the converter made the graphs.
        source: name or path of the dataset; empty if unknown.
        n_crystals: number of crystals; 0 if unknown.
        n_shards: number of graph shards present, according to file names; 0 for kind "frozen".
        n_shards_needed: number of shards of a finished cache; 0 if unknown.
        size: bytes on disk.
        used_at: time of the last write to a file in the folder, as a Unix timestamp in seconds.
    """

    folder: Path
    kind: str
    dataset: str
    structures: str
    current: bool
    source: str
    n_crystals: int
    n_shards: int
    n_shards_needed: int
    size: int
    used_at: float

    @property
    def is_unfinished(self) -> bool:
        return self.n_shards < self.n_shards_needed

    @property
    def how_far(self) -> str:
        return (
            f"unfinished, {self.n_shards} of {counted(self.n_shards_needed, 'shard')}; run mbqueue prepare to continue"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of verifying a graph cache.

    Attributes:
        wrong: a sentence for each problem. Shards that have not been built yet do not count as problems.
        left: sentences for the problems that a repair did not fix.
    """

    wrong: list[str]
    left: list[str]


def stored_caches(cache_dir: Path) -> list[StoredCache]:
    """Every cache in ``cache_dir``, newest first; files and folders that mbqueue did not make are ignored."""
    found = []
    for folder in sorted(cache_dir.iterdir()) if cache_dir.is_dir() else []:
        name = _NAME.fullmatch(folder.name)
        if name is None or not folder.is_dir():
            continue
        stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
        source, structures, n_crystals, n_shards, n_shards_needed = "", "", 0, 0, 0
        if not name["frozen"]:
            try:
                crystals, meta = Crystals.open(folder / CRYSTALS_FILE)
                source, n_crystals = str(meta.get("source", "")), len(crystals)
                structures = crystals.structures_hash[:16]
                if name["version"] == str(CONVERTER_VERSION):
                    n_shards, n_shards_needed = count_shards(crystals, folder)
            except CacheError:
                pass  # `verify_graphs` reports the problem
        found.append(
            StoredCache(
                folder=folder,
                kind="frozen" if name["frozen"] else "graphs",
                dataset=name["dataset"],
                structures=structures,
                current=bool(name["frozen"]) or name["version"] == str(CONVERTER_VERSION),
                source=source,
                n_crystals=n_crystals,
                n_shards=n_shards,
                n_shards_needed=n_shards_needed,
                size=sum(stat.st_size for stat in stats),
                used_at=max((stat.st_mtime for stat in stats), default=folder.stat().st_mtime),
            )
        )
    return sorted(found, key=lambda cache: -cache.used_at)


def verify_graphs(stored: StoredCache, *, repair: bool = False) -> Verdict:
    """Verify every checksum in a graph cache.

    Args:
        stored: a cache of kind "graphs".
        repair: whether to rebuild missing or damaged shards. ``crystals.bin`` cannot be repaired.

    Raises:
        CacheError: if a rebuilt shard cannot be written.
    """
    try:
        crystals, _ = Crystals.open(stored.folder / CRYSTALS_FILE)
    except CacheError as error:
        problem = f"{error} Run mbqueue prepare with the same dataset, or remove {stored.folder}."
        return Verdict(wrong=[problem], left=[problem])
    wrong = GraphCache.problems(crystals, stored.folder)
    if not repair or not (wrong or stored.is_unfinished):
        return Verdict(wrong=wrong, left=wrong)
    with building(stored.folder):
        cache = GraphCache.build(crystals, stored.folder)
        assert cache is not None, "build returns None only if should_stop is given"
        for number in cache.damaged():
            cache.repair(number)
    return Verdict(wrong=wrong, left=GraphCache.problems(crystals, stored.folder))


def prune_caches(
    cache_dir: Path,
    *,
    keep: Collection[str] = (),
    keep_sources: Collection[str] = (),
    note: Callable[[str], None] = lambda _text: None,
) -> list[StoredCache]:
    """Remove every cache that is outdated or that the arguments do not list; return the removed caches.

    A cache that is being built is never removed. A process that has opened a cache can keep reading it after the cache
    is removed.

    Args:
        keep: hashes of datasets to keep.
        keep_sources: names or paths of more datasets to keep, for datasets with an unknown hash. The hash of a dataset
            may be unknown while a session is preparing the dataset.
        note: called with a sentence for each cache that is kept because it is being built.
    """
    stored = stored_caches(cache_dir)
    kept = {dataset[:16] for dataset in keep} | {cache.dataset for cache in stored if cache.source in keep_sources}
    kept |= {cache.structures for cache in stored if cache.structures and cache.dataset in kept}
    # If a dataset's crystals are not in the cache, mbqueue cannot know which frozen features belong to the dataset.
    is_known = {dataset[:16] for dataset in keep} <= {cache.dataset for cache in stored if cache.structures}
    removed = []
    for cache in stored:
        is_needed = cache.dataset in kept or (cache.kind == "frozen" and not is_known)
        if cache.current and is_needed:
            continue
        with removing(cache.folder) as is_alone:
            if is_alone:
                shutil.rmtree(cache.folder)
                removed.append(cache)
            else:
                note(f"{cache.folder.name} is kept, because it is being built.")
    return removed
