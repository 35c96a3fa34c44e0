"""mbqueue finds lost parts of a queue on disks, drives, stores and servers; `recover` restores or names the parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lost_queues import LACKS, STATES, begin_second, commit, spec_of
from postgres_server import PostgresServer
from small_project import ManualClock, make_project

from mbqueue.api import Project
from mbqueue.buckets import STORE_VARIABLE
from mbqueue.drive.notes import keep_note, read_notes
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.recovery import recover
from mbqueue.drive.reentry import enter
from mbqueue.errors import QueueLost, UsageError
from mbqueue.experiment import Spec, load_spec
from mbqueue.files import temp_beside
from mbqueue.project import ProjectFolder
from mbqueue.queue.lost_work import described, lost_parts
from mbqueue.queue.opening import anything, note_once, open_on_server, open_queue
from mbqueue.queue.postgresql.server import exists
from mbqueue.queue.store import Queue
from mbqueue.storage.objects import ObjectStore
from mbqueue.topology import QUEUE_VARIABLE

FIVE = {"train.epochs": 5}


@pytest.fixture
def whole(tmp_path: Path) -> Project:
    """A project with an experiment of two folds, one of which has a commit."""
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("head_finetune", dataset="sample", folds=[0, 1], epochs=5)
    spec = spec_of(project, folds=[0, 1], **FIVE)
    commit(project.folder, spec, 0, epoch=1, enqueued=record_of(spec))
    note_once.cache_clear()
    return project


def record_of(spec: Spec) -> dict[str, Any]:
    """The entries of a manifest that record how an experiment was enqueued."""
    results = f"results/daily/2026-01-01/{spec.name}"
    return {"spec": spec.to_json(), "results_dir": results, "priority": 0, "enqueued_at": 1.0, "prepare": None}


def folds_of(folder: ProjectFolder) -> dict[str, list[int]]:
    with Queue(folder.queue_db, read_only=True) as queue:
        return {one.name: one.spec["folds"] for one in queue.experiments()}


def put(folder: ProjectFolder, name: str, clock: ManualClock) -> None:
    """Enqueue an experiment as a command does."""
    spec = load_spec(folder.experiment_file(name), overrides={"data.dataset": "sample"})
    with open_queue(folder) as queue:
        queue.enqueue(spec, results_dir=f"results/daily/2026-01-01/{name}", now=clock.now())
        keep_note(folder, queue, name)


def ignored(_text: str) -> None:
    """Do nothing."""


def test_a_note_that_a_killed_process_left_half_written_is_no_lost_experiment(whole: Project) -> None:
    (note,) = whole.folder.notes_dir.glob("*.json")
    temp = temp_beside(note)
    for content in ("", note.read_text()[:-9], note.read_text()):
        temp.write_text(content)
        with open_queue(whole.folder, read_only=True) as queue:
            assert lost_parts(whole.folder, queue) == []
        notes: list[str] = []
        assert len(read_notes(whole.folder, notes.append)) == 1
        assert notes == []
    os.utime(temp, (0, 0))
    whole.work(device="cpu", max_jobs=0)
    assert not temp.exists()


@pytest.mark.parametrize("damaged", ["checkpoints/head_finetune/fold_0/e0001-done-f*.json", "wanted/*.json"])
def test_a_damaged_file_does_not_prove_that_a_queue_was_lost(whole: Project, damaged: str) -> None:
    """A session that finds the damaged file sets it aside or skips it."""
    (path,) = (whole.folder.root / "state").glob(damaged)
    content = path.read_text()
    with open_queue(whole.folder, read_only=True) as queue:
        spec_hash = queue.experiment("head_finetune").spec_hash
        path.write_text(
            content.replace(f'"spec_hash": "{spec_hash[0]}', f'"spec_hash": "{int(spec_hash[0], 16) ^ 1:x}')
        )
        assert path.read_text() != content
        assert lost_parts(whole.folder, queue) == []


@pytest.mark.parametrize("state", STATES)
def test_after_recover_a_queue_lacks_nothing(whole: Project, state: str, caplog: pytest.LogCaptureFixture) -> None:
    STATES[state][0](whole)
    caplog.clear()
    whole.recover()
    assert folds_of(whole.folder)["head_finetune"] == [0, 1]
    with open_queue(whole.folder, read_only=True) as queue:
        assert lost_parts(whole.folder, queue) == []
        assert queue.experiment("head_finetune").spec["train"]["lr"] != 0.02
    if "other settings" in state:
        assert "head_finetune has different settings in the replaced queue than in its checkpoints" in caplog.text
        assert "(train.lr)" in caplog.text
    caplog.clear()
    whole.enqueue("pretrained_infer", dataset="sample")
    assert LACKS not in caplog.text
    with pytest.raises(UsageError, match="is intact"):
        whole.recover()


@pytest.mark.parametrize("is_noted", [True, False])
@pytest.mark.parametrize("has_commits", [True, False])
def test_recover_merges_the_folds_of_two_queues(whole: Project, is_noted: bool, has_commits: bool) -> None:
    if has_commits:  # `recover` must use the commits, so remove the note about the experiment
        (whole.folder.notes_dir / "head_finetune.json").unlink()
    else:
        (whole.folder.checkpoints_dir("head_finetune", 0) / "e0001-done-f0001.json").unlink()
    begin_second(whole, spec_of(whole, folds=[2, 3], **FIVE))
    with Queue(whole.folder.queue_db) as queue:
        queue.set_priority("head_finetune", 7, fold=3, now=0.0)
        if is_noted and has_commits:
            keep_note(whole.folder, queue, "head_finetune")
    whole.recover(force=True)
    assert folds_of(whole.folder) == {"head_finetune": [0, 1, 2, 3]}
    with open_queue(whole.folder, refuses=anything) as queue:
        assert {job.priority for job in queue.jobs(fold=3)} == {7}
        assert {job.priority for job in queue.jobs(fold=2)} == {0}


def test_recover_says_what_it_leaves_aside_and_where(whole: Project, caplog: pytest.LogCaptureFixture) -> None:
    first = spec_of(whole, folds=[0, 1], **FIVE)
    second = spec_of(whole, folds=[0, 1], **FIVE, **{"train.lr": 0.02})
    begin_second(whole, second)
    with Queue(whole.folder.queue_db) as queue:
        keep_note(whole.folder, queue, "head_finetune")  # earlier versions also overwrote the note
    commit(whole.folder, spec_of(whole, "full_finetune"), 0, epoch=1)
    (whole.folder.notes_dir / "broken.json").write_text("{")
    whole.recover()
    with open_queue(whole.folder, refuses=anything) as queue:
        assert queue.experiment("head_finetune").spec_hash == first.hash
    (aside,) = whole.folder.live_dir.glob("aside-*")
    kept = sorted(str(path.relative_to(aside)) for path in aside.rglob("*.json"))
    assert kept == [
        "checkpoints/full_finetune/fold_0/e0001-done-f0001.json",
        "wanted/broken.json",
        "wanted/head_finetune.json",
    ]
    for told in ("train.lr", "queue.db.replaced-", "fold_0", *kept[1:]):
        assert told in caplog.text
    (replaced,) = whole.folder.live_dir.glob("queue.db.replaced-*Z")
    with Queue(replaced, read_only=True) as queue:
        assert queue.experiment("head_finetune").spec_hash == second.hash


def test_restore_does_not_replace_what_recover_would_bring_back(whole: Project, tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar"
    (whole.folder.checkpoints_dir("head_finetune", 0) / "e0001-done-f0001.json").unlink()
    whole.back_up(archive)
    begin_second(whole, spec_of(whole, "full_finetune"))
    with pytest.raises(QueueLost, match=r"checkpoints or notes of experiments.*mbqueue recover"):
        whole.restore(archive)
    whole.folder.queue_db.unlink()
    with pytest.raises(QueueLost, match="mbqueue recover"):
        whole.restore(archive)
    assert not whole.folder.queue_db.exists()
    whole.restore(archive, force=True)
    assert list(whole.folder.live_dir.glob("replaced-*/wanted/head_finetune.json"))
    assert folds_of(whole.folder) == {"head_finetune": [0, 1]}


def test_a_search_of_many_trials_lacks_nothing_until_some_are_lost(whole: Project) -> None:
    specs = [
        spec_of(whole, name=f"rates.{number:03}", folds=[0], **{"train.lr": 1e-4 * (number + 1)})
        for number in range(40)
    ]
    with open_queue(whole.folder) as queue:
        for spec in specs:
            queue.enqueue(spec, results_dir=f"results/daily/2026-01-01/{spec.name}", now=0.0)
            keep_note(whole.folder, queue, spec.name)
            commit(whole.folder, spec, 0, epoch=1)
        assert lost_parts(whole.folder, queue) == []
    begin_second(whole, *specs[:-12])
    with Queue(whole.folder.queue_db) as queue:
        said = described(lost_parts(whole.folder, queue))
    assert said.startswith("head_finetune, rates.028, rates.029, ")
    assert said.endswith(", rates.034 and 5 more")


def test_a_new_machine_on_a_drive_lacks_nothing(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_project(tmp_path / "mount").root
    first, second = (ProjectFolder(root, live=tmp_path / name) for name in ("first", "second"))
    first.live_dir.mkdir()
    put(first, "head_finetune", clock)
    assert Publisher(first, None, note=ignored, clock=clock).round()
    enter(second, note=ignored, clock=clock)
    put(second, "full_finetune", clock)
    first.queue_db.unlink()  # the first machine loses its queue
    enter(first, note=ignored, clock=clock)
    open_queue(first, refuses=anything).close()
    assert LACKS not in caplog.text
    assert "head_finetune" in folds_of(first)


def test_a_live_folder_that_has_more_than_the_drive_says_so(tmp_path: Path, clock: ManualClock) -> None:
    project = ProjectFolder(make_project(tmp_path / "mount").root, live=tmp_path / "live")
    project.live_dir.mkdir()
    put(project, "head_finetune", clock)
    assert Publisher(project, None, note=ignored, clock=clock).round()
    put(project, "full_finetune", clock)
    project.queue_db.unlink()
    enter(project, note=ignored, clock=clock)
    with pytest.raises(QueueLost, match=rf"{LACKS} full_finetune\."):
        open_queue(project, refuses=anything)
    recover(project, force=False, note=ignored, clock=clock)
    open_queue(project, refuses=anything).close()
    assert set(folds_of(project)) == {"head_finetune", "full_finetune"}


def test_no_queue_is_begun_beside_a_store_with_commits_of_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "share").mkdir()
    store = ObjectStore.open((tmp_path / "share").as_uri())
    monkeypatch.setenv(STORE_VARIABLE, (tmp_path / "share").as_uri())
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("head_finetune", dataset="sample")
    assert store.check()
    store.put("checkpoints/head_finetune/fold_0/e0001-done-f0001.json", b"{}")
    project.enqueue("pretrained_infer", dataset="sample")
    assert caplog.text == ""
    other = Project(make_project(tmp_path / "other").root)
    with pytest.raises(QueueLost, match=r"contains commits of head_finetune.*mbqueue recover"):
        other.enqueue("pretrained_infer", dataset="sample")
    assert folds_of(other.folder) == {}


def test_a_queue_on_a_server_says_what_it_lacks(
    whole: Project, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def enqueue() -> object:
        return Project(whole.folder.root).enqueue("pretrained_infer", dataset="sample")

    url = postgres_server.url()
    monkeypatch.setenv(QUEUE_VARIABLE, url)
    on_server = Project(whole.folder.root)
    for command in (on_server.status, enqueue):
        with pytest.raises(QueueLost, match=r"or is still in .*queue\.db \(mbqueue migrate-queue"):
            command()
    assert not exists(url)
    with open_on_server(url) as queue:  # create a second queue, which earlier versions could do
        queue.enqueue(spec_of(whole, "full_finetune"), results_dir="results/daily/2026-01-01/x", now=0.0)
    on_server.status()
    assert LACKS not in caplog.text, "its experiments are in the file, which is whole"
    whole.folder.queue_db.unlink()
    on_server.status()
    assert f"{LACKS} head_finetune." in caplog.text
    assert "MBQUEUE_QUEUE=sqlite mbqueue recover" in caplog.text
    with pytest.raises(QueueLost, match=rf"{LACKS} head_finetune\."):
        enqueue()
    other = postgres_server.url()
    monkeypatch.setenv(QUEUE_VARIABLE, other)
    for command in (Project(whole.folder.root).status, enqueue):
        with pytest.raises(QueueLost, match="The queue was lost"):
            command()
    assert not exists(other)
