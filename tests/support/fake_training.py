"""Sessions that do everything but train: real queue, real commits, real publishing, and tiny checkpoints.

A checkpoint's bytes say which steps it went through, and by whom, so a chain that is damaged or mixed shows itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_project import ManualClock

from mbqueue.drive.outcomes import enqueued_facts
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.errors import LeaseLost
from mbqueue.experiment import parse_spec
from mbqueue.files import sha256_of_json
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.jobs import Experiment, Job, Kind, Lease, State
from mbqueue.queue.store import Queue
from mbqueue.results.tables import history_file, model_file, predictions_file
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Identity, Manifest
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_folder, named_after

#: What the commits of its first fold are.
FAKE = Identity(experiment="fake", fold=0)
STEPS = 2
LEASE_SECONDS = 100.0
DATASET_HASH = "d" * 64
FAKE_RESULTS = "results/daily/2026-01-01/fake"


class FakeSession:
    """One session on one machine, moved on by `step`."""

    def __init__(self, root: Path, live: Path, clock: ManualClock, **publishing: Any) -> None:
        self.clock = clock
        self.notes: list[str] = []
        self.project = ProjectFolder(root, Settings(), live)
        self.lease: Lease | None = None
        self.steps_trained = 0
        enter(self.project, note=self.notes.append, clock=clock)
        self.queue = Queue(self.project.queue_db)
        self.id = self.queue.start_session(device="fake", now=clock.now(), alive_seconds=LEASE_SECONDS)
        self.publisher = Publisher(self.project, self.id, clock=clock, note=self.notes.append, **publishing)
        self.publisher.round()

    def publish(self) -> bool:
        """One round of publishing."""
        return self.publisher.round()

    def end(self) -> None:
        """End in good order."""
        self.queue.end_session(self.id, reason="ended", now=self.clock.now())
        self.publisher.round(ended="ended")
        self.queue.close()

    def step(self) -> bool:
        """Claim a job, or do a part of the one that is held; whether there was something to do."""
        now = self.clock.now()
        self.queue.heartbeat(self.id, now=now, alive_seconds=LEASE_SECONDS)
        if self.lease is None:
            if self.publisher.others:
                self.publisher.reconcile(self.queue, now=self.clock.monotonic())
            self.lease = self.queue.claim(self.id, now=now, lease_seconds=LEASE_SECONDS)
            return self.lease is not None
        try:
            self.lease = self.queue.renew(self.lease, now=now, lease_seconds=LEASE_SECONDS)
            if self._work(self.lease):
                self.lease = None
        except LeaseLost:
            self.lease = None
        return True

    def _work(self, lease: Lease) -> bool:
        job = lease.job
        experiment = self.queue.experiment_of(job.experiment_id)
        now = self.clock.now()
        if job.kind is Kind.PREPARE:
            self.queue.commit(lease, result={"dataset_hash": DATASET_HASH}, now=now)
        elif job.kind is Kind.TRAIN:
            return self._train(lease, experiment)
        elif job.kind is Kind.PREDICT:
            self._predict(lease, experiment)
        else:
            folder = self.project.working_results(experiment.results_dir)
            missing = [fold for fold in experiment.spec["folds"] if not predictions_file(folder, fold).exists()]
            if missing:
                epochs = experiment.spec["train"]["epochs"]
                self.queue.rewind(
                    experiment.name, dict.fromkeys(missing, "missing"), to_epoch=epochs, now=now, lease=lease
                )
                return True
            files = {
                fold: hashlib.sha256(predictions_file(folder, fold).read_bytes()).hexdigest()
                for fold in experiment.spec["folds"]
            }
            (folder / "results.json").write_text(json.dumps({"run": {"files": {}}, "folds": files}))
            self.queue.commit(lease, result={"mae": 0.1, "mae_std": 0.0}, now=now)
        return True

    def checkpoints(self, experiment: Experiment, fold: int) -> OwnCommits:
        jobs = self.queue.jobs(experiment=experiment.name, state=State.COMMITTED)
        prepare = next((job.result for job in jobs if job.kind is Kind.PREPARE), None)
        folder = self.project.checkpoints_dir(experiment.name, fold)
        identity, enqueued = experiment.identity(fold), enqueued_facts(experiment, prepare)
        return OwnCommits(in_folder(folder), identity, enqueued=enqueued)

    def _train(self, lease: Lease, experiment: Experiment) -> bool:
        job, now = lease.job, self.clock.now()
        assert job.fold is not None
        assert job.epoch is not None
        commits = self.checkpoints(experiment, job.fold)
        folder = self.project.checkpoints_dir(experiment.name, job.fold)
        newest = newest_whole(folder, self.notes.append)
        reached = 0 if newest is None else newest.epoch if newest.complete else newest.epoch - 1
        if reached < job.epoch - 1:
            self.queue.rewind(experiment.name, {job.fold: "damaged"}, to_epoch=reached, now=now, lease=lease)
            return True
        if newest is not None and newest.complete and newest.epoch >= job.epoch:
            self.queue.commit(lease, result={**newest.history[job.epoch - 1], "best_epoch": 1}, now=now)
            return True
        within = newest is not None and not newest.complete
        lineage = [] if newest is None else lineage_of(folder, newest.stem)
        step = (newest.step if newest is not None and within else 0) + 1
        sessions = list(newest.epoch_sessions) if newest is not None and within else []
        if self.id not in sessions:
            sessions.append(self.id)
        lineage.append([job.epoch, step, self.id])
        self.steps_trained += 1
        history = [] if newest is None else [dict(row) for row in newest.history]
        best = dict(newest.best) if newest is not None and newest.best else None
        is_complete = step == STEPS
        content = json.dumps({"fold": job.fold, "lineage": lineage}).encode()
        if is_complete:
            value = int(sha256_of_json(lineage)[:6], 16) / 2**24
            history.append(
                {"epoch": job.epoch, "val_mae": value, "seconds": 1.0 * len(lineage), "session": "+".join(sessions)}
            )
            if best is None or value < best["val_mae"]:
                best = {"epoch": job.epoch, "val_mae": value, "commit": f"e{job.epoch:04d}-done-f{lease.fence:04d}"}
        staged = commits.stage(
            content,
            {
                "experiment": experiment.name,
                "spec_hash": experiment.spec_hash,
                "dataset_hash": DATASET_HASH,
                "fold": job.fold,
                "epoch": job.epoch,
                "step": step,
                "steps_per_epoch": STEPS,
                "complete": is_complete,
                "fence": lease.fence,
                "parent": newest.stem if newest else None,
                "parent_sha256": newest.sha256 if newest else None,
                "session": self.id,
                "written_at": "2026-01-01T00:00:00Z",
                "best": best,
                "history": history,
                "fingerprint": {},
                "epoch_sessions": sessions,
                "epoch_seconds": float(step),
            },
        )

        def publish() -> None:
            staged.publish()

        try:
            if is_complete:
                assert best is not None
                result = {**history[-1], "best_epoch": best["epoch"]}
                self.queue.commit(lease, result=result, now=now, publish=publish)
            else:
                self.queue.save_progress(lease, progress={"done": step}, publish=publish)
        finally:
            staged.discard()
        commits.prune()
        return is_complete

    def _predict(self, lease: Lease, experiment: Experiment) -> None:
        job = lease.job
        assert job.fold is not None
        folder = self.project.checkpoints_dir(experiment.name, job.fold)
        newest = newest_whole(folder, self.notes.append)
        epochs = experiment.spec["train"]["epochs"]
        if newest is None or not newest.complete or newest.epoch < epochs:
            reached = 0 if newest is None else newest.epoch if newest.complete else newest.epoch - 1
            self.queue.rewind(
                experiment.name, {job.fold: "damaged"}, to_epoch=reached, now=self.clock.now(), lease=lease
            )
            return
        assert newest.best is not None
        lineage = lineage_of(folder, newest.best["commit"])
        folder = self.project.working_results(experiment.results_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (model_file, history_file, predictions_file):
            text = json.dumps({"lineage": lineage, "history": newest.history})
            name(folder, job.fold).write_text(text)
        self.queue.commit(lease, result={"test_mae": 0.1, "absent_elements": []}, now=self.clock.now())


def lineage_of(folder: Path, stem: str) -> list[list[Any]]:
    """The steps that a checkpoint went through: [epoch, step, session]."""
    lineage: list[list[Any]] = json.loads((folder / f"{stem}.pt").read_bytes())["lineage"]
    return lineage


def newest_whole(folder: Path, on_wrong: Callable[[str], object]) -> Manifest | None:
    """The newest whole commit in a local folder; nothing is changed there."""
    commits = Commits(in_folder(folder), named_after(folder), lambda base, why: on_wrong(f"{base}: {why}") and None)
    newest = commits.newest()
    return None if newest is None else newest.manifest


def is_done(queue: Queue) -> bool:
    """Whether nothing is left."""
    jobs: tuple[Job, ...] = queue.jobs()
    return bool(jobs) and all(job.state in {State.COMMITTED, State.SKIPPED} for job in jobs)


class LocalProject:
    """A project on a local disk with two fake folds."""

    def __init__(self, root: Path, clock: ManualClock) -> None:
        self.project, self.clock = init_project(root)[0], clock
        content = {"name": "fake", "folds": (0, 1), "data": {"dataset": "sample"}, "train": {"epochs": 2}}
        with Queue(self.project.queue_db) as queue:
            queue.enqueue(parse_spec(content, source="test"), results_dir=FAKE_RESULTS, now=clock.now(), priority=3)

    def train(self, steps: int) -> FakeSession:
        """A session of so many steps, which is still at work."""
        session = FakeSession.__new__(FakeSession)
        # A local project publishes nothing, so the session has no publisher that could do anything.
        session.project, session.clock, session.notes = self.project, self.clock, []
        session.lease, session.steps_trained = None, 0
        session.queue = Queue(self.project.queue_db)
        session.id = session.queue.start_session(device="fake", now=self.clock.now(), alive_seconds=100.0)
        session.publisher = _NoPublisher()  # type: ignore[assignment]
        while session.steps_trained < steps:
            self.clock.advance(1.0)
            assert session.step()
        return session


class _NoPublisher:
    others: tuple[object, ...] = ()
