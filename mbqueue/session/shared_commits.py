"""The commits of a project in the object store: which there are, sending and fetching them. Without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from mbqueue.drive.recover import newest_whole
from mbqueue.errors import CheckpointError
from mbqueue.objects import ObjectStore
from mbqueue.project import STORED_CHECKPOINTS, ProjectFolder
from mbqueue.queue.jobs import Experiment
from mbqueue.train.manifest import Manifest, manifest_named
from mbqueue.train.store_place import StorePlace

_MANIFEST = re.compile(r"([^/]+)/fold_([0-4])/e(\d{4,9})-(done|s\d{6,12})-f\d{4,9}\.json")


def fold_place(project: ProjectFolder, store: ObjectStore, experiment: str, fold: int) -> StorePlace:
    """The commits of a fold in the store, with copies where a project without a store has its commits."""
    return StorePlace(store, experiment, fold, project.checkpoints_dir(experiment, fold))


def finished_epochs(store: ObjectStore) -> dict[tuple[str, int], int]:
    """(experiment, fold) → the last finished epoch that the store has, 0 for a part of the first; by names alone."""
    return epochs_named(store.names(STORED_CHECKPOINTS))


def epochs_named(names: Iterable[str]) -> dict[tuple[str, int], int]:
    """As `finished_epochs`, of manifests named EXPERIMENT/fold_i/STEM.json."""
    found: dict[tuple[str, int], int] = {}
    for name in names:
        if match := _MANIFEST.fullmatch(name):
            key = (match[1], int(match[2]))
            found[key] = max(found.get(key, 0), int(match[3]) - (match[4] != "done"))
    return found


def fetch_commits(project: ProjectFolder, store: ObjectStore, *, note: Callable[[str], None]) -> None:
    """Copy the newest whole commit of every fold, and that of its best epoch, to where local commits are."""
    for experiment, fold in sorted(finished_epochs(store)):
        place = fold_place(project, store, experiment, fold)
        found: list[Manifest] = []
        for stem in place.stems():
            try:
                found.append(manifest_named(stem, place.manifest(stem), source=f"{place.name}/{stem}.json"))
            except (CheckpointError, FileNotFoundError) as error:
                note(f"{place.name}/{stem}.json is passed over: {error}")
        for manifest in sorted(found, key=lambda one: one.order, reverse=True):
            stem = manifest.best["commit"] if manifest.best else manifest.stem
            best = next((one for one in found if one.stem == stem), None)
            if best is not None and place.fetch(best) and place.fetch(manifest):
                break
            note(f"{place.name}/{manifest.stem} is passed over: it, or the commit of its best epoch, is not whole.")


def send_fold(
    project: ProjectFolder,
    store: ObjectStore,
    experiment: Experiment,
    fold: int,
    epochs: int,
    note: Callable[[str], None],
) -> bool:
    """Put a fold's newest commit and that of its best epoch into the store, if this machine has them."""
    folder = project.checkpoints_dir(experiment.name, fold)
    newest = newest_whole(folder, note)
    if newest is None or newest.spec_hash != experiment.spec_hash or newest.epoch - (not newest.complete) < epochs:
        return False
    place = fold_place(project, store, experiment.name, fold)
    best = newest.best["commit"] if newest.best else newest.stem
    for stem in dict.fromkeys((best, newest.stem)):
        listing = (folder / f"{stem}.json").read_bytes()
        place.send(manifest_named(stem, listing, source=str(folder)), (folder / f"{stem}.pt").read_bytes(), listing)
    note(f"The checkpoints of {experiment.name}, fold {fold}, were sent to {store.url}.")
    return True
