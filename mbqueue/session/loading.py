"""Load an experiment's crystals and graphs from the cache, filling it from the source if needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from mbqueue.session.sources import remember, remembered, source_key
from mbqueue.storage.objects import ObjectStore
from mbqueue.task import FORMATION_ENERGY, Target

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """An experiment's data, ready for training.

    Attributes:
        wanted: the [data] section it was loaded for.
        crystals, graphs: in the same order.
        source: its name or path, for messages.
        official: whether it is matbench's own dataset, whole and in its order.
        dropped: (id, reason) of each entry left out.
    """

    wanted: DataSpec
    crystals: Crystals
    graphs: GraphCache
    source: str
    official: bool
    dropped: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint's entries about the data, except its hash."""
        return {"converter": CONVERTER_VERSION}


def load_data(
    project: ProjectFolder,
    wanted: DataSpec,
    *,
    seed: int,
    dataset_hash: str | None,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None],
    target: Target = FORMATION_ENERGY.target,
    targets_required: bool = True,
    store: ObjectStore | None = None,
    keep: Callable[[SharedCrystals, Path, str], None] | None = None,
) -> LoadedData | None:
    """The crystals and graphs that a [data] section asks for; None if asked to stop before they are complete.

    Args:
        seed: draws the crystals if the section has a limit.
        dataset_hash: hash of the crystals, once the experiment is prepared. If the cache has them, the source is not
            read.
        store: the project's object store, if it has one that is already open.
        target: the kind and column of the property to predict.
        targets_required: whether a crystal without a target is an error; else its target is nan.
        keep: called with a file of crystals for other machines, and its dataset's hash. By default the file is copied
            before this returns.

    Raises:
        DataError: if the source cannot be used, or has changed since the experiment was prepared.
        CacheError: if the cache cannot be written, or is removed in the meantime.
    """
    shared = shared_crystals_of(project, store)
    found, is_new, is_kept, columns = None, False, False, ""
    if dataset_hash is not None:
        found = _from_cache(project, dataset_hash, note)
        if found is None:
            found = _from_shared(project, shared, dataset_hash, note)
            is_kept = found is not None
    key = None
    if found is None:
        key = source_key(wanted, project_root=project.root, seed=seed, target=target, targets_required=targets_required)
        found = _read_before(project, key, dataset_hash, note)
    if found is None:
        dataset = datasets.load(
            wanted.dataset,
            project_root=project.root,
            limit=wanted.limit,
            seed=seed,
            drop_invalid=wanted.drop_invalid,
            target=target,
            targets_required=targets_required,
            id_column=wanted.id_column,
            progress=progress("reading"),
        )
        columns = dataset.columns
        note(columns)
        if dataset_hash is not None and dataset.crystals.hash != dataset_hash:
            raise DataError(
                f"{dataset.source} has changed since this experiment was prepared (the hash of its crystals was "
                f"{dataset_hash[:16]}…, it is now {dataset.crystals.hash[:16]}…). Restore the old data, or enqueue "
                "it under a new name (--name)."
            )
        meta: dict[str, Any] = {"source": dataset.source, "official": dataset.official, "dropped": dataset.dropped}
        found = dataset.crystals, meta
        is_new = True
    crystals, meta = found
    folder = project.cache_dir / folder_name(crystals)
    file = folder / CRYSTALS_FILE
    with building(folder):
        if is_new or not file.exists():  # `mbqueue cache prune` may have removed it since
            crystals.save(file, meta)
        if is_new and key is not None:
            remember(project.cache_dir, key, crystals.hash, meta | {"columns": columns})
        if shared is not None and not is_kept:
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
                f"Files of {folder} were removed while it was being built. The next attempt makes them again."
            )
    return LoadedData(
        wanted=wanted,
        crystals=crystals,
        graphs=graphs,
        source=meta["source"],
        official=meta["official"],
        dropped=tuple((crystal_id, reason) for crystal_id, reason in meta["dropped"]),
    )


def _cached(project: ProjectFolder, dataset_hash: str) -> Path:
    return project.cache_dir / f"{dataset_hash[:16]}-{CONVERTER_VERSION}" / CRYSTALS_FILE


def _read_before(
    project: ProjectFolder, key: str | None, dataset_hash: str | None, note: Callable[[str], None]
) -> tuple[Crystals, dict[str, Any]] | None:
    """The result of an earlier reading of the source; None if it must be read."""
    known = None if key is None or dataset_hash is not None else remembered(project.cache_dir, key)
    if known is None:
        return None
    kept = _from_cache(project, known[0], note)
    if kept is None:
        return None
    columns = known[1].pop("columns", "")
    if columns:
        note(columns)
    return kept[0], known[1]


def _from_cache(
    project: ProjectFolder, dataset_hash: str, note: Callable[[str], None]
) -> tuple[Crystals, dict[str, Any]] | None:
    path = _cached(project, dataset_hash)
    return _opened(path, dataset_hash, note, "fetched or read again") if path.exists() else None


def _from_shared(
    project: ProjectFolder, shared: SharedCrystals | None, dataset_hash: str, note: Callable[[str], None]
) -> tuple[Crystals, dict[str, Any]] | None:
    path = _cached(project, dataset_hash)
    is_there = fetch_crystals(shared, dataset_hash, path, note)
    return _opened(path, dataset_hash, note, "read from their source again") if is_there else None


def _opened(
    path: Path, dataset_hash: str, note: Callable[[str], None], otherwise: str
) -> tuple[Crystals, dict[str, Any]] | None:
    """The crystals in a file, and their metadata; None if it is damaged or has other crystals."""
    try:
        crystals, meta = Crystals.open(path)
    except CacheError as error:
        note(f"{error} The crystals are {otherwise}.")
        return None
    return (crystals, meta) if crystals.hash == dataset_hash else None
