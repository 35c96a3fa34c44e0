"""List, send and fetch the commits of a project in the object store. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from mbqueue.project import STORED_CHECKPOINTS, ProjectFolder
from mbqueue.queue.jobs import Experiment
from mbqueue.storage.commits import Commits, passed_over
from mbqueue.storage.manifest import Identity
from mbqueue.storage.names import CommitFile, manifests_named
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.places import in_folder, in_store, named_after


def finished_epochs(store: ObjectStore) -> dict[tuple[str, int], int]:
    """Map (experiment, fold) to the last finished epoch in the store, read from file names; 0 if none is finished."""
    return epochs_of(manifests_named(store.names(STORED_CHECKPOINTS)))


def epochs_of(manifests: Iterable[tuple[str, int, CommitFile]]) -> dict[tuple[str, int], int]:
    """Map (experiment, fold) to the last finished epoch, using only manifests whose names contain no hash."""
    found: dict[tuple[str, int], int] = {}
    for experiment, fold, file in manifests:
        if file.is_plain_manifest:
            found[experiment, fold] = max(found.get((experiment, fold), 0), file.finished_epochs)
    return found


def fetch_commits(project: ProjectFolder, store: ObjectStore, *, note: Callable[[str], None]) -> None:
    """Copy each fold's newest intact commit, and the commit of its best epoch, to the local folders."""
    for experiment, fold in sorted(finished_epochs(store)):
        identity = Identity(experiment=experiment, fold=fold)
        place = in_store(store, identity)
        there = Commits(place, identity, passed_over(place.name, note))
        here = Commits(in_folder(project.checkpoints_dir(experiment, fold)), identity)
        for commit, checkpoint in there.chain():
            here.put(commit, checkpoint)


def remove_released(project: ProjectFolder, trials: Iterable[Experiment], store: ObjectStore | None) -> None:
    """Remove the checkpoints of the given pruned trials, on this machine and in the store.

    Raises:
        StoreError: if the store is not responding; the next call removes the rest.
    """
    names = {trial.name for trial in trials}
    if not names:
        return
    for folder in project.fold_dirs():
        if folder.parent.name in names:
            Commits(in_folder(folder), named_after(folder)).clear()
            with suppress(OSError):  # keep a folder with damaged files, because you may want to inspect them
                folder.rmdir()
                folder.parent.rmdir()
    for experiment, fold in finished_epochs(store) if store is not None else ():
        if experiment in names:
            identity = Identity(experiment=experiment, fold=fold)
            assert store is not None
            Commits(in_store(store, identity), identity).clear()


def send_fold(
    project: ProjectFolder,
    store: ObjectStore,
    experiment: Experiment,
    fold: int,
    epochs: int,
    note: Callable[[str], None],
) -> bool:
    """Send a fold's newest commit and the commit of its best epoch to the store; return whether the store has both.

    The result is False if this machine has fewer than ``epochs`` finished epochs, or if the store already has a
    different commit with the same name.
    """
    folder, identity = project.checkpoints_dir(experiment.name, fold), experiment.identity(fold)
    here = Commits(in_folder(folder), identity, passed_over(str(folder), note))
    chain = here.chain()
    if not chain or chain[-1][0].manifest.finished_epochs < epochs:
        return False
    there = Commits(in_store(store, identity), identity)
    for commit, checkpoint in chain:
        there.put_checkpoint(commit, checkpoint)
        manifest = there.place.manifest(commit)
        if not store.create_patiently(manifest, commit.content):
            note(f"{store.url}/{manifest} differs from the commit in {folder}, and was left unchanged.")
            return False
    note(f"The checkpoints of {experiment.name}, fold {fold}, were sent to {store.url}.")
    return True
