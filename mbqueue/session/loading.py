"""Load an experiment's crystals and graphs from the cache, and fill the cache from the source if needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mbqueue.data import datasets
from mbqueue.data.cache_lock import building
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache, count_shards, folder_name
from mbqueue.data.graphs import CONVERTER_VERSION
from mbqueue.drive.crystals import SharedCrystals, fetch_crystals, publish_crystals, shared_crystals_of
from mbqueue.errors import CacheError, DataError
from mbqueue.experiment import DataSpec
from mbqueue.project import ProjectFolder
from mbqueue.session.sources import DataRequest, remember, remembered, source_key
from mbqueue.storage.objects import ObjectStore

#: A function that takes the name of a task, and returns a progress callback for the arguments (done, total).
Progress = Callable[[str], Callable[[int, int], None]]
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """An experiment's data, ready for training.

    Attributes:
        data_spec: the [data] section that requested the data.
        crystals, graphs: the crystals and their graphs, in the same order.
        source: the source's name or path, as shown in messages.
        official: whether this is matbench's own dataset, complete and in the original order.
        dropped: (id, reason) of each entry left out.
    """

    data_spec: DataSpec
    crystals: Crystals
    graphs: GraphCache
    source: str
    official: bool
    dropped: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The version of the graph converter, for a run's fingerprint."""
        return {"converter": CONVERTER_VERSION}


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Crystals before their conversion to graphs.

    Attributes:
        columns: a sentence about the chosen columns; empty if the source was not read.
        is_new: whether the crystals were read from the source just now.
        is_shared: whether the crystals came from shared storage.
    """

    crystals: Crystals
    meta: dict[str, Any]
    columns: str = ""
    is_new: bool = False
    is_shared: bool = False


def load_data(
    project: ProjectFolder,
    request: DataRequest,
    *,
    dataset_hash: str | None,
    progress: Progress,
    note: Note,
    should_stop: Callable[[], bool] = lambda: False,
    store: ObjectStore | None = None,
    keep: Callable[[SharedCrystals, Path, str], None] | None = None,
) -> LoadedData | None:
    """Load the requested crystals and graphs; return None if the session is asked to stop before all are loaded.

    Args:
        dataset_hash: hash of the crystals, known once the experiment is prepared. If the cache has these crystals, the
            source is not read.
        store: the project's object store, if one is already open.
        keep: called with the shared folder, a file of crystals and the dataset's hash, to copy the file for other
            machines. By default, the file is copied before this function returns.

    Raises:
        DataError: if the source cannot be used, or has changed since the experiment was prepared.
        CacheError: if the cache cannot be written, or is removed while this function uses it.
    """
    shared, key = shared_crystals_of(project, store), None
    found = None if dataset_hash is None else _stored(project, shared, dataset_hash, note)
    if found is None:
        key = source_key(request, project_root=project.root)
        if dataset_hash is None and key is not None:
            found = _read_before(project, key, note)
    if found is None:
        found = _read(project, request, progress("reading"), note)
        _check_unchanged(found, dataset_hash)
    crystals, meta = found.crystals, found.meta
    folder = project.cache_dir / folder_name(crystals)
    file = folder / CRYSTALS_FILE
    with building(folder):
        if found.is_new or not file.exists():  # `mbqueue cache prune` may have removed the file
            crystals.save(file, meta)
        if found.is_new and key is not None:
            remember(project.cache_dir, key, crystals.hash, meta | {"columns": found.columns})
        if shared is not None and not found.is_shared:
            if keep is not None:
                keep(shared, file, crystals.hash)
            else:
                publish_crystals(shared, file, crystals.hash, note)
        graphs = GraphCache.build(crystals, folder, progress=progress("converting"), should_stop=should_stop)
        if graphs is None:
            return None
        n_shards, n_needed = count_shards(crystals, folder)
        if n_shards < n_needed or not file.exists():
            raise CacheError(
                f"Files were removed from {folder} while it was being built. The next attempt recreates them."
            )
    return LoadedData(
        data_spec=request.data,
        crystals=crystals,
        graphs=graphs,
        source=meta["source"],
        official=meta["official"],
        dropped=tuple((crystal_id, reason) for crystal_id, reason in meta["dropped"]),
    )


def _stored(project: ProjectFolder, shared: SharedCrystals | None, dataset_hash: str, note: Note) -> _Found | None:
    """Return the crystals with the given hash from the cache or from shared storage; None if neither has them."""
    found = _from_cache(project, dataset_hash, note)
    if found is not None:
        return found
    path = _cached(project, dataset_hash)
    if not fetch_crystals(shared, dataset_hash, path, note):
        return None
    found = _opened(path, dataset_hash, note, "read from their source again")
    return None if found is None else replace(found, is_shared=True)


def _read_before(project: ProjectFolder, key: str, note: Note) -> _Found | None:
    """Return the cached crystals of a source that was read before; None if the source must be read again."""
    known = remembered(project.cache_dir, key)
    if known is None:
        return None
    dataset_hash, meta = known
    found = _from_cache(project, dataset_hash, note)
    if found is None:
        return None
    columns = meta.pop("columns", "")
    if columns:
        note(columns)
    return replace(found, meta=meta)


def _read(project: ProjectFolder, request: DataRequest, progress: Callable[[int, int], None], note: Note) -> _Found:
    dataset = datasets.load(
        request.data.dataset,
        project_root=project.root,
        limit=request.data.limit,
        seed=request.seed,
        drop_invalid=request.data.drop_invalid,
        target=request.target,
        targets_required=request.targets_required,
        id_column=request.data.id_column,
        progress=progress,
    )
    note(dataset.columns)
    meta: dict[str, Any] = {"source": dataset.source, "official": dataset.official, "dropped": dataset.dropped}
    return _Found(crystals=dataset.crystals, meta=meta, columns=dataset.columns, is_new=True)


def _check_unchanged(found: _Found, dataset_hash: str | None) -> None:
    if dataset_hash is not None and found.crystals.hash != dataset_hash:
        raise DataError(
            f"{found.meta['source']} has changed since this experiment was prepared (the hash of its crystals was "
            f"{dataset_hash[:16]}… and is now {found.crystals.hash[:16]}…). Restore the old data, then run "
            "mbqueue retry. Or enqueue the experiment under a new name (--name)."
        )


def _cached(project: ProjectFolder, dataset_hash: str) -> Path:
    return project.cache_dir / f"{dataset_hash[:16]}-{CONVERTER_VERSION}" / CRYSTALS_FILE


def _from_cache(project: ProjectFolder, dataset_hash: str, note: Note) -> _Found | None:
    path = _cached(project, dataset_hash)
    return _opened(path, dataset_hash, note, "fetched again or read from their source") if path.exists() else None


def _opened(path: Path, dataset_hash: str, note: Note, otherwise: str) -> _Found | None:
    """Read the crystals in a file; return None if the file is damaged or the crystals have a different hash."""
    try:
        crystals, meta = Crystals.open(path)
    except CacheError as error:
        note(f"{error} The crystals are {otherwise}.")
        return None
    return _Found(crystals=crystals, meta=meta) if crystals.hash == dataset_hash else None
