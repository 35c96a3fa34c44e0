"""Up to four real sessions on a drive that lies, in random schedules of delays, deaths and lost mounts.

A schedule depends only on its seed. To run more schedules, set MBQUEUE_SCHEDULES=2000. To repeat a schedule, set
MBQUEUE_SCHEDULE_SEED=77.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from lying_drive import LONGEST_UPLOAD, Client, LyingDrive
from small_project import ManualClock
from stepped_session import RESULTS, STEPS, SteppedSession, is_done, lineage_of, newest_whole, tiny_spec
from tiny_family import load_model

from mbqueue.drive import published, retention
from mbqueue.drive.published import PublishedFold
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.errors import CheckpointError, UsageError
from mbqueue.project import ProjectFolder, Settings
from mbqueue.queue.store import Queue
from mbqueue.results.tables import history_file, model_file, write_history
from mbqueue.storage.manifest import Identity, Manifest, manifest_of
from mbqueue.storage.mounted import Drive

SCHEDULES = int(os.environ.get("MBQUEUE_SCHEDULES", "10"))
ONE_SEED = os.environ.get("MBQUEUE_SCHEDULE_SEED")
EPOCHS = 2


class Schedule:
    """Several sessions that share one drive, with random events that the seed decides."""

    def __init__(self, base: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.base, self.clock = base, ManualClock()
        self.drive = LyingDrive(base / "drive", self.chance, self.clock.monotonic)
        self.held: dict[str, Manifest] = {}
        self.running: dict[int, tuple[SteppedSession, Client]] = {}
        self.sessions: dict[int, str] = {}
        self.most = self.chance.choice([1, 2, 2, 3, 4])
        self.machines = 0
        self.steps_trained = self.deaths = 0

    def run(self) -> None:
        """Enqueue; start sessions, kill them and unmount their drives at random; at the end, kill all sessions."""
        first = self._machine()
        session = self.running[first][0] if first in self.running else None
        assert session is None
        for _ in range(self.chance.randrange(20, 70)):
            self.clock.advance(self.chance.choice([1.0, 10.0, 40.0]))
            self._act()
            self.drive.move()
            self.check_that_no_line_was_lost()
        for number in list(self.running):
            self._die(number)
            self.check_that_no_line_was_lost()
        self.drive.settle()

    def _act(self) -> None:
        if len(self.running) < self.most and self.chance.random() < 0.4:
            self._machine()
            return
        if not self.running:
            return
        number = self.chance.choice(sorted(self.running))
        session, client = self.running[number]
        what = self.chance.random()
        if what < 0.55:
            for _ in range(self.chance.randrange(1, 4)):
                session.step()
        elif what < 0.80:
            session.publish()
        elif what < 0.88:
            client.lose_mount()
        elif what < 0.95:
            client.remount()
        else:
            self._die(number)

    def _machine(self) -> int:
        """Connect a new machine to the drive, and start a session on it if the queue has jobs."""
        self.machines += 1
        number = self.machines
        client = self.drive.connect()
        live = self.base / f"live{number}"
        project = ProjectFolder(client.folder, Settings(), live)
        if number == 1:
            enter(project, note=lambda _text: None, clock=self.clock)
            with Queue(project.queue_db) as queue:
                queue.enqueue(tiny_spec(epochs=EPOCHS), results_dir=RESULTS, now=self.clock.now())
            assert Publisher(project, None, note=lambda _text: None, clock=self.clock).round()
            self.drive.settle()  # let the drive upload the enqueued experiment
        try:
            self.running[number] = self._session(client, live), client
        except UsageError as error:
            if "Nothing is enqueued" not in str(error):
                raise
            # The new machine is lost before it has seen a snapshot.
            self.drive.kill(client)
            shutil.rmtree(live)
        return -1 if number == 1 else number

    def _session(self, client: Client, live: Path) -> SteppedSession:
        session = SteppedSession(client.folder, live, self.clock)
        self.sessions[session.number] = session.id
        return session

    def _die(self, number: int) -> None:
        session, client = self.running.pop(number)
        self.steps_trained += session.steps_trained
        self.deaths += 1
        session.die()
        self.drive.kill(client)
        shutil.rmtree(session.project.live_dir)

    def check_that_no_line_was_lost(self) -> None:
        """Check that for every earlier commit, the cloud has its line of commits or a line with as much progress.

        If two lines contain different commits of one epoch, one commit may replace the other. The line whose commit was
        replaced may then lack its best epoch.
        """
        whole = whole_commits(self.drive.cloud)
        self.held |= whole
        for path, manifest in self.held.items():
            survives = any(
                one.continues(manifest) or manifest.continues(one) or progress(one) >= progress(manifest)
                for one in whole.values()
            )
            assert survives, f"{path} was uploaded, and nothing is left of its line, nor anything as far"

    def finish(self) -> SteppedSession:
        """Let one session run all remaining jobs, without any failure."""
        self.clock.advance(10_000.0)
        self.machines += 1
        client = self.drive.connect()
        self.drive.deliver(client, share=1.0)
        session = self._session(client, self.base / f"live{self.machines}")
        session.publish()
        for _ in range(200):
            self.clock.advance(1.0)
            if not session.step() and is_done(session.queue):
                break
        assert is_done(session.queue), [(job.label, job.state.value) for job in session.queue.jobs()]
        session.end()
        self.steps_trained += session.steps_trained
        self.drive.settle()
        return session


def whole_commits(cloud: dict[str, bytes]) -> dict[str, Manifest]:
    """Path of the manifest → commits that a new machine would find complete, with their best epoch."""
    checkpoints = {hashlib.sha256(content).hexdigest() for path, content in cloud.items() if path.endswith(".pt")}
    found = {}
    for path, content in cloud.items():
        if path.startswith("state/checkpoints/") and path.endswith(".json"):
            with contextlib.suppress(CheckpointError):
                manifest = manifest_of(content, source=path)
                if manifest.sha256 in checkpoints:
                    found[path] = manifest
    return {
        path: one
        for path, one in found.items()
        if one.best is None or any(one.best["commit"] == best.stem and one.continues(best) for best in found.values())
    }


def progress(manifest: Manifest) -> tuple[int, bool, int]:
    """Return the progress of a commit, as a value that grows with training."""
    return manifest.epoch, manifest.complete, manifest.step


def check_chain(schedule: Schedule, folder: Path, fold: int) -> None:
    """Check that a fold's accepted commits contain every step once, and that the history names its session."""
    newest = newest_whole(folder, pytest.fail)
    assert newest is not None
    lineage = lineage_of(folder, newest.stem)
    assert len(lineage) == EPOCHS * STEPS
    for number, row in enumerate(newest.history):
        trained = dict.fromkeys(schedule.sessions[one] for one in lineage[number * STEPS : (number + 1) * STEPS])
        # A history row also names sessions that only validated. Keep only the sessions that trained.
        named = [session for session in row["session"].split("+") if session in trained]
        assert named == list(trained), "the history is of another line than the checkpoint"
    assert newest.best is not None
    best = lineage_of(folder, newest.best["commit"])
    assert best == lineage[: len(best)], "the best epoch is of another line"
    model = load_model(model_file(folder.parents[2] / RESULTS, fold))
    assert model.lineage[: len(best)].tolist() == best, "the model is of another line"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep files for less than half an hour: a schedule takes minutes, and its folds have few commits."""
    monkeypatch.setattr(retention, "SETTLED_SECONDS", LONGEST_UPLOAD + 10.0)
    monkeypatch.setattr(published, "KEPT", 1)


@pytest.mark.parametrize("part", range(5))
def test_sessions_on_an_unreliable_drive_converge_on_one_whole_chain_per_fold(part: int, tmp_path: Path) -> None:
    seeds = range(part, SCHEDULES, 5) if ONE_SEED is None else [int(ONE_SEED)][: 1 if part == 0 else 0]
    trained = deaths = aside = 0
    for seed in seeds:
        base = tmp_path / str(seed)
        base.mkdir()
        try:
            schedule = Schedule(base, seed)
            schedule.run()
            last = schedule.finish()
            for fold in (0, 1):
                check_chain(schedule, last.project.checkpoints_dir("tiny", fold), fold)
            check_that_a_fresh_machine_agrees(schedule, last)
        except BaseException as error:
            error.add_note(f"MBQUEUE_SCHEDULE_SEED={seed}")
            raise
        trained, deaths = trained + schedule.steps_trained, deaths + schedule.deaths
        aside += len(json.loads(last.project.publishing_file.read_text())["aside"])
        shutil.rmtree(base)
    needed = 2 * EPOCHS * STEPS * len(seeds)
    print(  # noqa: T201 - the counts of docs/explanation/reliability.md: pytest -rP
        f"{len(seeds)} schedules, {deaths} deaths, {trained} steps for {needed}, {aside} commits kept aside"
    )


def check_that_a_fresh_machine_agrees(schedule: Schedule, last: SteppedSession) -> None:
    """Check that another machine with the same files accepts the same chains and finds no work."""
    client = schedule.drive.connect()
    schedule.drive.deliver(client, share=1.0)
    project = ProjectFolder(client.folder, Settings(), schedule.base / "fresh")
    notes: list[str] = []
    enter(project, note=notes.append, clock=schedule.clock)
    drive = Drive(client.folder)
    with Queue(project.queue_db) as queue:
        assert is_done(queue), notes
        for fold in (0, 1):
            chain = PublishedFold(drive, Identity(experiment="tiny", fold=fold)).chain()
            ours = newest_whole(last.project.checkpoints_dir("tiny", fold), pytest.fail)
            theirs = newest_whole(project.checkpoints_dir("tiny", fold), pytest.fail)
            assert chain
            assert chain[-1][0].manifest == ours == theirs
            write_history(schedule.base / "history.csv", chain[-1][0].manifest.history)
            told = history_file(client.folder / RESULTS, fold).read_bytes()
            assert told == (schedule.base / "history.csv").read_bytes(), "the results are of another line"
