"""The content of a project's cache folder: list, check and remove it. All of it can be rebuilt."""

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
from mbqueue.errors import CacheError

_NAME = re.compile(r"(?P<frozen>frozen-)?(?P<dataset>[0-9a-f]{16})-(?P<version>\w+)")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class StoredCache:
    """One folder of the cache.

    Attributes:
        folder: where it is.
        kind: "graphs" (crystals and their graphs) or "frozen" (what a frozen backbone gives for them).
        dataset: first 16 characters of the hash of the crystals; of a frozen backbone, perhaps of their structures'.
        structures: of graphs, first 16 characters of the hash of the crystals' structures; else empty.
        current: False for graphs that another version of the converter made, which nothing will ever use.
        source: name or path of the data set; empty where that is not known.
        n_crystals: 0 where that is not known.
        n_shards: shards of graphs that are there, by their names; 0 for kind "frozen".
        n_shards_needed: shards of a finished cache; 0 where that is not known.
        size: bytes on disk.
        used_at: when a file in it was last written, seconds since the epoch.
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
        """Whether shards are still to be made."""
        return self.n_shards < self.n_shards_needed

    @property
    def how_far(self) -> str:
        """The state of an unfinished cache in words."""
        return f"unfinished, {self.n_shards} of {self.n_shards_needed} shards; mbqueue prepare carries on"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What verifying a cache of graphs gave.

    Attributes:
        wrong: a sentence for each thing that was not as it should be; a cache that is only unfinished has none.
        left: those that still are so.
    """

    wrong: list[str]
    left: list[str]


def stored_caches(cache_dir: Path) -> list[StoredCache]:
    """Every cache in ``cache_dir``, the newest first; what is not of mbqueue's making is left out."""
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
                pass  # half made, or damaged: `verify` shows which
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


def verify_graphs(stored: StoredCache, *, repair: bool = False, progress: Progress | None = None) -> Verdict:
    """Compare every byte of a cache of graphs with its checksums.

    Args:
        stored: a cache of kind "graphs".
        repair: make again what is missing or damaged; the binary crystals themselves cannot be, from here.
        progress: called with (crystals done, all) while missing shards are made.

    Raises:
        CacheError: if what is made again cannot be written.
    """
    try:
        crystals, _ = Crystals.open(stored.folder / CRYSTALS_FILE)
    except CacheError as error:
        problem = f"{error} Run mbqueue prepare with its dataset, or remove {stored.folder}."
        return Verdict(wrong=[problem], left=[problem])
    wrong = GraphCache.problems(crystals, stored.folder)
    if not repair or not (wrong or stored.is_unfinished):
        return Verdict(wrong=wrong, left=wrong)
    with building(stored.folder):
        cache = GraphCache.build(crystals, stored.folder, progress=progress)
        assert cache is not None, "no stop is requested"
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
    """Remove every cache that nothing asks to be kept, and tell which; what is not current is never kept.

    A cache that is just being built stays. A process that reads one of them can finish.

    Args:
        keep: hashes of data sets.
        keep_sources: names or paths of data sets whose crystals are perhaps just being prepared, by a hash that is
            not known yet: between the cache and the job's commit, the backbone takes its time.
        note: called for each cache that stays because it is being built.
    """
    stored = stored_caches(cache_dir)
    kept = {dataset[:16] for dataset in keep} | {cache.dataset for cache in stored if cache.source in keep_sources}
    kept |= {cache.structures for cache in stored if cache.structures and cache.dataset in kept}
    # Of a dataset whose crystals are not here it is not known which backbone's features are theirs.
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
                note(f"{cache.folder.name} stays: it is just being built.")
    return removed
