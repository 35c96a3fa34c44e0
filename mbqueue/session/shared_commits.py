"""List, send and fetch the commits of a project in the object store. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress

from mbqueue.project import STORED_CHECKPOINTS, ProjectFolder
from mbqueue.queue.jobs import Experiment
from mbqueue.storage.commits import Commits, passed_over
from mbqueue.storage.manifest import Identity
from mbqueue.storage.names import commit_file
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.places import in_folder, in_store, named_after


def finished_epochs(store: ObjectStore) -> dict[tuple[str, int], int]:
    """The last finished epoch in the store by (experiment, fold), from names alone; 0 if the first is unfinished."""
    return epochs_named(store.names(STORED_CHECKPOINTS))


def epochs_named(names: Iterable[str]) -> dict[tuple[str, int], int]:
    """Like `finished_epochs`, but from a list of manifests named EXPERIMENT/fold_i/STEM.json."""
    found: dict[tuple[str, int], int] = {}
    for name in names:
        experiment, _, rest = name.partition("/")
        folder, _, last = rest.partition("/")
        commit = commit_file(last)
        if commit is None or (commit.suffix, commit.digits) != ("json", ""):
            continue
        if re.fullmatch(r"fold_[0-4]", folder):
            key = (experiment, int(folder[-1]))
            found[key] = max(found.get(key, 0), commit.finished_epochs)
    return found


def fetch_commits(project: ProjectFolder, store: ObjectStore, *, note: Callable[[str], None]) -> None:
    """Copy the newest intact commit of every fold, and that of its best epoch, to the folders of local commits."""
    for experiment, fold in sorted(finished_epochs(store)):
        identity = Identity(experiment=experiment, fold=fold)
        place = in_store(store, identity)
        there = Commits(place, identity, passed_over(place.name, note))
        here = Commits(in_folder(project.checkpoints_dir(experiment, fold)), identity)
        for commit in there.chain():
            here.put(commit, there.checkpoint(commit))


def remove_released(project: ProjectFolder, trials: Iterable[Experiment], store: ObjectStore | None) -> None:
    """Remove the remaining checkpoints of released trials, on this machine and in the store.

    Raises:
        StoreError: if the store does not answer; the next call removes the rest.
    """
    names = {trial.name for trial in trials}
    if not names:
        return
    for folder in project.fold_dirs():
        if folder.parent.name in names:
            Commits(in_folder(folder), named_after(folder)).clear()
            with suppress(OSError):  # a folder with damaged files stays: you may want to inspect them
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
    """Put a fold's newest commit and that of its best epoch into the store; return whether the store has both now.

    Afterwards, the store lacks only a commit that this machine lacks too, or whose name another commit has.
    """
    folder, identity = project.checkpoints_dir(experiment.name, fold), experiment.identity(fold)
    here = Commits(in_folder(folder), identity, passed_over(str(folder), note))
    chain = here.chain()
    if not chain or chain[-1].manifest.finished_epochs < epochs:
        return False
    there = Commits(in_store(store, identity), identity)
    for commit in chain:
        there.put_checkpoint(commit, here.checkpoint(commit))
        manifest = there.place.path(f"{commit.base}.json")
        if not store.create_patiently(manifest, commit.content):
            note(f"{store.url}/{manifest} is a different commit from the one in {folder}, and was left unchanged.")
            return False
    note(f"The checkpoints of {experiment.name}, fold {fold}, were sent to {store.url}.")
    return True
