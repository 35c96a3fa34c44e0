"""Resume a project on a mount from where its last session stopped.

A new live folder starts with the newest intact snapshot of the queue. At the start, and while other sessions are
running, mbqueue compares everything published with the live state. mbqueue enqueues experiments that exist only in
another database. If a fold is further along on the mount, mbqueue adopts the fold's verified files and results. If the
files of a recorded job are missing, mbqueue queues the job again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from mbqueue.belonging import Belonging
from mbqueue.clock import Clock, SystemClock
from mbqueue.drive.livestate import LiveState, as_published, remember_root
from mbqueue.drive.moving import stray_state
from mbqueue.drive.outcomes import PublishedResults, ResultListing, chain_of, histories_of
from mbqueue.drive.published import PublishedFold, experiment_folders, published_folds
from mbqueue.drive.rebuilding import enqueue_again, rebuild_queue, record_in, trained_by
from mbqueue.drive.snapshots import PublishedSnapshot, Snapshots
from mbqueue.errors import QueueError
from mbqueue.experiment import hash_of_spec
from mbqueue.files import sha256_of_file
from mbqueue.project import PUBLISHED_OUTCOMES, ProjectFolder, fold_name
from mbqueue.queue.jobs import Experiment, Job, Kind, State
from mbqueue.queue.opening import cut_off_restore
from mbqueue.queue.store import Queue
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Commit, Identity
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import HASH_DIGITS
from mbqueue.storage.places import in_folder


def enter(project: ProjectFolder, *, note: Callable[[str], None], clock: Clock | None = None) -> None:
    """Ensure that a project on a drive has a live queue, rebuilt from published files if necessary.

    Raises:
        OSError: if the mount fails before a live queue exists.
        SchemaTooNew: if the newest snapshot was written by a newer mbqueue.
    """
    if project.queue_db.exists():
        remember_root(project)
        return
    drive = Drive(project.root, Belonging.of(project.live_dir))
    reentry = Reentry(project, drive, note=note, clock=clock or SystemClock())
    project.live_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(project.entering_lock, timeout=600):
        # After an interrupted restore, only some files are from the archive. Creating a new queue now would hide the
        # interrupted restore.
        if not project.queue_db.exists() and cut_off_restore(project) is None:
            reentry.restore()
        remember_root(project)
        if not project.queue_db.exists() and (stray := stray_state(project)):
            note(
                f"Sessions that ran without a live folder left {stray} behind. This project is on a drive or network "
                f"mount and now uses {project.live_dir}. If its queue is on a server, set MBQUEUE_QUEUE. To use the "
                "work in state/, run: mbqueue recover"
            )


class Reentry:
    """Adopts published files into the live folder of one project."""

    def __init__(self, project: ProjectFolder, drive: Drive, *, note: Callable[[str], None], clock: Clock) -> None:
        self._project, self._drive, self._note, self._clock = project, drive, note, clock
        self._folds: dict[Identity, PublishedFold] = {}
        self._found: dict[str, str] | None = None
        self.results = PublishedResults(drive, self.damaged)
        self.snapshots = Snapshots(drive, self.damaged)

    def damaged(self, path: str, why: str) -> None:
        """Report a damaged file on the mount once. Do not remove the file, because its upload may not be complete."""
        if self._found is not None:
            self._found[path] = why
        else:
            self._remember({path: why})

    @contextmanager
    def _remembering_at_once(self) -> Iterator[None]:
        """Collect the damaged files that the ``with`` block finds, and record all of them in one write."""
        if self._found is not None:
            yield
            return
        self._found = {}
        try:
            yield
        finally:
            found, self._found = self._found, None
            self._remember(found)

    def _remember(self, found: Mapping[str, str]) -> None:
        with LiveState.changing(self._project.publishing_file) as state:
            new = {path: why for path, why in found.items() if state.damaged.get(path) != why}
            state.damaged |= new
        for path, why in new.items():
            self._note(f"{path} is skipped: {why}")

    def published_fold(self, identity: Identity) -> PublishedFold:
        """The commits of a fold on the mount."""
        if identity not in self._folds:
            self._folds[identity] = PublishedFold(self._drive, identity, self.damaged)
        return self._folds[identity]

    def restore(self, *, from_snapshot: bool = True, further: Callable[[Queue], None] = lambda _queue: None) -> None:
        """Build the live queue: start from the newest intact snapshot or an empty queue, and add all newer work.

        Args:
            further: called at the end with the new queue, to which it may add experiments.
        """
        self._drive.check()
        snapshot: PublishedSnapshot | None = None

        def lay(path: Path) -> bool:
            nonlocal snapshot
            if from_snapshot:
                with self._remembering_at_once():
                    snapshot = self.snapshots.fetch_newest(path)
            return snapshot is not None

        def fill(queue: Queue) -> None:
            state = LiveState(damaged=LiveState.load(self._project.publishing_file).damaged)
            if snapshot is not None:
                listing, now = snapshot.listing, self._clock.now()
                state.number, state.ancestry = listing.number, {**listing.ancestry, listing.database: listing.number}
                queue.end_all_sessions(reason="the queue was restored from a snapshot", now=now, by="restore")
                self._note(f"The queue was restored from {snapshot.base}.")
            state.save(self._project.publishing_file)
            self.reconcile(queue, at_start=True)
            further(queue)

        rebuild_queue(self._project, fill, lay=lay)

    def reconcile(
        self,
        queue: Queue,
        *,
        at_start: bool = False,
        by: str = "restore",
        on_taken: Callable[[tuple[int, int]], None] = lambda _fold: None,
    ) -> None:
        """Compare everything published with the live state, and adopt whatever is newer.

        Args:
            at_start: whether to queue recorded work again if its files are missing.
            on_taken: called with (experiment id, fold) right after a fold's checkpoints were adopted.
        """
        with self._remembering_at_once():
            self._reconcile(queue, at_start, by, on_taken)

    def _reconcile(self, queue: Queue, at_start: bool, by: str, on_taken: Callable[[tuple[int, int]], None]) -> None:
        for record in self._known_experiments():
            enqueue_again(queue, record, now=self._clock.now(), by=by, note=self._note)
        pruned = self._pruned_elsewhere()
        for experiment in queue.experiments():
            for outcome in self.results.listed(experiment.name):
                if outcome.kind == Kind.PREPARE and outcome.spec_hash == experiment.spec_hash:
                    self._prepared(queue, experiment, outcome.result, by)
            for fold in experiment.spec["folds"]:
                if self._fold(queue, experiment, fold, at_start, by):
                    on_taken((experiment.id, fold))
            self._results(queue, experiment, at_start, by)
            # Do not prune a trial that the user has resumed on this machine.
            why = pruned.get((experiment.name, experiment.spec_hash))
            if why is not None and not experiment.spec.get("trial", {}).get("kept", True):
                queue.prune(experiment.name, why=why, now=self._clock.now(), by=by)

    def _pruned_elsewhere(self) -> dict[tuple[str, str], str]:
        """Read from the newest snapshots why trials were pruned: (trial, hash of its spec) → reason.

        The key contains the hash, because two machines that could not see each other's work may have started trials
        with the same name and different settings.
        """
        newest = {one.listing.database: one.listing for one in self.snapshots.listed()}
        return {
            (one["spec"]["name"], hash_of_spec(one["spec"])): one["pruned"]
            for listing in newest.values()
            for one in listing.experiments
            if "pruned" in one
        }

    def _known_experiments(self) -> list[Mapping[str, Any]]:
        """The records of experiments in the mount's snapshots, listings and manifests, oldest experiment first."""
        found: dict[str, Mapping[str, Any]] = {}
        for snapshot in self.snapshots.listed():
            for one in snapshot.listing.experiments:
                found[one["spec"]["name"]] = one
        for name in experiment_folders(self._drive, PUBLISHED_OUTCOMES):
            for outcome in self.results.listed(name):
                found.setdefault(name, outcome.enqueued)
        for name, fold in published_folds(self._drive):
            if name not in found:
                published = self.published_fold(Identity(experiment=name, fold=fold))
                for commit in published.commits():
                    if (record := record_in(commit.manifest, published.place.path(commit.base))) is not None:
                        found[name] = record
        return sorted(found.values(), key=lambda one: (one["enqueued_at"], one["spec"]["name"]))

    def _prepared(self, queue: Queue, experiment: Experiment, result: Mapping[str, Any], by: str) -> None:
        with contextlib.suppress(QueueError):  # this machine's `prepare` job reports a difference between crystals
            queue.adopt_result(
                experiment.name, Kind.PREPARE, result=result, source="the mount", now=self._clock.now(), by=by
            )

    def _fold(self, queue: Queue, experiment: Experiment, fold: int, at_start: bool, by: str) -> bool:
        if experiment.is_released:
            return False  # no commits are needed, because the histories are in the trial's spec
        folder = self._project.checkpoints_dir(experiment.name, fold)
        identity = experiment.identity(fold)
        here = Commits(in_folder(folder), identity)
        local = here.newest_manifest()
        published = self.published_fold(identity)
        chain = published.chain(above=local)
        if not chain:
            if at_start:
                queue.adopt(trained_by(experiment, fold, local), now=self._clock.now(), by=by)
            return False
        manifest = chain[-1][0].manifest
        if manifest.enqueued and manifest.enqueued["prepare"]:
            self._prepared(queue, experiment, manifest.enqueued["prepare"], by)
        taken = queue.adopt(
            trained_by(experiment, fold, manifest),
            now=self._clock.now(),
            by=by,
            publish=lambda: self._take_over(here, folder, chain),
        )
        if taken:
            with LiveState.changing(self._project.publishing_file) as state:
                state.commits[f"{experiment.name}/{fold_name(fold)}"] = as_published(manifest)
        return taken

    def _take_over(self, here: Commits, folder: Path, chain: list[tuple[Commit, bytes]]) -> None:
        """Copy accepted commits into the live folder. Set aside commits outside the newest commit's history."""
        newest = chain[-1][0].manifest
        on_line = {one.base for one in here.commits() if newest.continues(one.manifest)}
        aside = folder / "aside"
        for stem in here.bases():
            if stem not in on_line:
                aside.mkdir(exist_ok=True)
                if here.rename(stem, lambda name: f"aside/{sha256_of_file(folder / name)[:HASH_DIGITS]}-{name}"):
                    self._note(
                        f"{folder / stem} was moved to {aside}, because the commits that the queue accepted do not "
                        "continue from it."
                    )
        for commit, checkpoint in chain:
            here.put(commit, checkpoint)

    def _results(self, queue: Queue, experiment: Experiment, at_start: bool, by: str) -> None:
        jobs = queue.jobs(experiment=experiment.name)
        histories = histories_of(jobs)
        listed = [one for one in self.results.listed(experiment.name) if one.spec_hash == experiment.spec_hash]
        folder = self._project.working_results(experiment.results_dir)
        for job in jobs:
            if job.kind not in {Kind.PREDICT, Kind.RECORD} or job.state in {State.LEASED, State.CANCELLED}:
                continue
            if job.state is State.COMMITTED and not at_start:
                continue
            wanted = job.kind, job.fold, chain_of(job, histories)
            fits = [one for one in listed if (one.kind, one.fold, one.chain) == wanted]
            self._result(queue, experiment, job, fits, folder, by)

    def _result(
        self, queue: Queue, experiment: Experiment, job: Job, fits: list[ResultListing], folder: Path, by: str
    ) -> None:
        now = self._clock.now()
        if job.state is not State.COMMITTED and not self._may_be_adopted(queue, job):
            return
        for outcome in reversed(fits):
            if self.results.fetch(outcome, folder):
                if job.state is not State.COMMITTED:
                    source = f"the results of fold {job.fold}" if job.fold is not None else "the recorded results"
                    queue.adopt_result(
                        experiment.name, job.kind, result=outcome.result, source=source, now=now, fold=job.fold, by=by
                    )
                return
        if job.state is State.COMMITTED:
            fold = job.fold if job.fold is not None else experiment.spec["folds"][0]
            why = f"files of {job.label} are missing or damaged on the mount"
            self._note(f"{job.label} runs again: {why}.")
            epochs = experiment.spec["train"]["epochs"]
            queue.rewind(experiment.name, {fold: why}, to_epoch=epochs, now=now, by=by)

    def _may_be_adopted(self, queue: Queue, job: Job) -> bool:
        jobs = queue.jobs(experiment=job.experiment)
        if job.kind is Kind.RECORD:
            needed = [one for one in jobs if one.kind is Kind.PREDICT]
        else:
            needed = [one for one in jobs if one.kind is Kind.TRAIN and one.fold == job.fold]
        return all(one.state in {State.COMMITTED, State.SKIPPED} for one in needed)
