"""What lies in a project's cache folder: told, checked, thrown away. All of it can be made again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache
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
        dataset: first 16 characters of the hash of the crystals.
        current: False for graphs that another version of the converter made, which nothing will ever use.
        source: name or path of the data set; empty where that is not known.
        n_crystals: 0 where that is not known.
        size: bytes on disk.
        used_at: when a file in it was last written, seconds since the epoch.
    """

    folder: Path
    kind: str
    dataset: str
    current: bool
    source: str
    n_crystals: int
    size: int
    used_at: float


def stored_caches(cache_dir: Path) -> list[StoredCache]:
    """Every cache in ``cache_dir``, the newest first; what is not of mbqueue's making is left out."""
    found = []
    for folder in sorted(cache_dir.iterdir()) if cache_dir.is_dir() else []:
        name = _NAME.fullmatch(folder.name)
        if name is None or not folder.is_dir():
            continue
        stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
        source, n_crystals = "", 0
        if not name["frozen"]:
            try:
                crystals, meta = Crystals.open(folder / CRYSTALS_FILE)
                source, n_crystals = str(meta.get("source", "")), len(crystals)
            except CacheError:
                pass  # half made, or damaged: `verify` tells which
        found.append(
            StoredCache(
                folder=folder,
                kind="frozen" if name["frozen"] else "graphs",
                dataset=name["dataset"],
                current=bool(name["frozen"]) or name["version"] == str(CONVERTER_VERSION),
                source=source,
                n_crystals=n_crystals,
                size=sum(stat.st_size for stat in stats),
                used_at=max((stat.st_mtime for stat in stats), default=folder.stat().st_mtime),
            )
        )
    return sorted(found, key=lambda cache: -cache.used_at)


def verify_graphs(stored: StoredCache, *, repair: bool = False, progress: Progress | None = None) -> list[str]:
    """Compare every byte of a cache of graphs with its checksums.

    Args:
        stored: a cache of kind "graphs".
        repair: make again what is missing or damaged; the binary crystals themselves cannot be, from here.
        progress: called with (crystals done, all) while missing shards are made.

    Returns:
        a sentence for each thing that was wrong; none for a sound cache.
    """
    try:
        crystals, _ = Crystals.open(stored.folder / CRYSTALS_FILE)
    except CacheError as error:
        return [str(error)]
    problems = []
    try:
        cache = GraphCache.open(crystals, stored.folder)
    except CacheError as error:
        problems.append(str(error))
        built = GraphCache.build(crystals, stored.folder, progress=progress) if repair else None
        if built is None:
            return problems
        cache = built
    for number in cache.damaged():
        problems.append(f"{stored.folder}: shard {number} is damaged.")
        if repair:
            cache.repair(number)
    return problems


def prune_caches(
    cache_dir: Path, *, keep: Collection[str] = (), keep_sources: Collection[str] = ()
) -> list[StoredCache]:
    """Remove every cache that nothing asks to be kept, and tell which; what is not current is never kept.

    A process that reads one of them at this moment goes on reading it; one that builds it fails.

    Args:
        keep: hashes of data sets.
        keep_sources: names or paths of data sets whose crystals are perhaps just being prepared, by a hash that is
            not known yet.
    """
    stored = stored_caches(cache_dir)
    kept = {dataset[:16] for dataset in keep} | {cache.dataset for cache in stored if cache.source in keep_sources}
    removed = [cache for cache in stored if not cache.current or cache.dataset not in kept]
    for cache in removed:
        shutil.rmtree(cache.folder)
    return removed
