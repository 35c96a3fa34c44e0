"""The functions behind recover, backup and restore."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from small_project import ManualClock
from stepped_session import RESULTS, LocalProject, SteppedSession, is_done, tiny_spec

from mbqueue import Project
from mbqueue.drive import archive as archive_module
from mbqueue.drive.archive import DamagedArchive, back_up, restore
from mbqueue.drive.recovery import recover
from mbqueue.drive.snapshots import DamagedSnapshot
from mbqueue.errors import QueueError, QueueLost, UsageError, causes
from mbqueue.experiment import parse_spec
from mbqueue.files import sha256_of_json
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import require_no_cut_off_restore, require_queue
from mbqueue.queue.store import Queue


def note(_text: str) -> None:
    """Do nothing."""


@pytest.fixture
def local(tmp_path: Path, clock: ManualClock) -> LocalProject:
    return LocalProject(tmp_path / "project", clock)


def epochs_and_rows(project: ProjectFolder) -> list[tuple[str, State, object]]:
    with Queue(project.queue_db, read_only=True) as queue:
        return [
            # Ignore how long each save took, because only the queue records it.
            (job.label, job.state, {**(job.result or {}), "checkpoint_seconds": 0})
            for job in queue.jobs()
            if job.kind is Kind.TRAIN and job.state is State.COMMITTED
        ]


@pytest.mark.parametrize("loss", ["gone", "garbled"])
def test_recover_rebuilds_the_queue_from_the_manifests_alone(local: LocalProject, loss: str) -> None:
    local.train(5).end()
    before = epochs_and_rows(local.project)
    assert len(before) >= 2
    if loss == "gone":
        for path in local.project.state_dir.glob("queue.db*"):
            path.unlink()
    else:
        local.project.queue_db.write_bytes(b"garbage" * 5000)
    found = recover(local.project, force=False, note=note, clock=local.clock)
    assert (found.replaced is not None) == (loss == "garbled")
    assert epochs_and_rows(local.project) == before
    with Queue(local.project.queue_db) as queue:
        experiment = queue.experiment("tiny")
        assert (experiment.results_dir, experiment.priority, experiment.spec["folds"]) == (RESULTS, 3, [0, 1])
    session = local.train(3)
    for _ in range(20):
        session.step()
    assert is_done(session.queue)


@pytest.mark.parametrize("second", ["other", "tiny"])
def test_a_new_queue_beside_checkpoints_of_a_lost_one_costs_no_epoch(local: LocalProject, second: str) -> None:
    local.train(5).end()
    before = epochs_and_rows(local.project)
    with Queue(local.project.queue_db) as queue:
        spec = queue.experiment("tiny").spec
    local.project.queue_db.unlink()
    with Queue(local.project.queue_db) as queue:  # earlier versions could start a second queue
        queue.enqueue(parse_spec(spec | {"name": second}, source="test"), results_dir=f"results/{second}", now=0.0)
    recover(local.project, force=second == "tiny", note=note, clock=local.clock)
    assert epochs_and_rows(local.project) == before
    with Queue(local.project.queue_db, read_only=True) as queue:
        assert {one.name for one in queue.experiments()} == {"tiny", second}


def test_recover_uses_the_newest_intact_commit_and_requeues_the_rest(local: LocalProject) -> None:
    local.train(4).end()
    folder = local.project.checkpoints_dir("tiny", 0)
    newest = folder / "e0002-done-f0001.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    local.project.queue_db.unlink()
    told: list[str] = []
    recover(local.project, force=False, note=told.append, clock=local.clock)
    assert any("e0002-done-f0001" in text for text in told)
    with Queue(local.project.queue_db) as queue:
        states = {job.epoch: job.state for job in queue.jobs(fold=0) if job.epoch}
    assert states[2] is not State.COMMITTED


def test_manifests_without_a_spec_are_read_with_the_experiment_file(local: LocalProject) -> None:
    local.train(4).end()
    manifests = list(local.project.checkpoints_dir("tiny", 0).glob("*.json"))
    assert manifests
    for path in manifests:
        content = json.loads(path.read_text())
        for key in ("enqueued", "parent_sha256", "checksum"):
            del content[key]
        content["checksum"] = sha256_of_json(content)
        path.write_text(json.dumps(content))
    local.project.queue_db.unlink()
    told: list[str] = []
    with pytest.raises(QueueError, match="nothing to rebuild a queue from"):
        recover(local.project, force=False, note=told.append, clock=local.clock)
    assert any("its manifests do not contain the spec of tiny" in text for text in told), "\n".join(told)
    spec = 'name = "tiny"\nfolds = [0, 1]\n[data]\ndataset = "sample"\nlimit = 12\n'
    spec += '[model]\npretrained = "tiny"\ntrainable = "head"\n[train]\nepochs = 2\nbatch_size = 5\n'
    (local.project.jobs_dir / "tiny.toml").write_text(spec)
    recover(local.project, force=False, note=note, clock=local.clock)
    assert len(epochs_and_rows(local.project)) == 2


def test_recover_and_restore_refuse_to_replace_an_intact_queue_or_one_in_use(
    local: LocalProject, tmp_path: Path
) -> None:
    session = local.train(2)
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    with pytest.raises(UsageError, match="mbqueue stop"):
        recover(local.project, force=True, note=note, clock=local.clock)
    with pytest.raises(UsageError, match="mbqueue stop"):
        restore(local.project, tmp_path / "b.tar", force=True, note=note, clock=local.clock)
    session.end()
    with pytest.raises(UsageError, match="--force"):
        recover(local.project, force=False, note=note, clock=local.clock)
    with pytest.raises(UsageError, match="--force"):
        restore(local.project, tmp_path / "b.tar", force=False, note=note, clock=local.clock)


def test_a_session_killed_a_moment_ago_does_not_block_recover(local: LocalProject) -> None:
    local.train(2).die()
    connection = sqlite3.connect(local.project.queue_db)
    with connection:
        connection.execute(
            "UPDATE sessions SET pid_started = pid_started - 1"
        )  # pretend that a newer process now has this pid
    connection.close()
    recover(local.project, force=True, note=note, clock=local.clock)
    assert epochs_and_rows(local.project)


@pytest.mark.parametrize(("name", "other"), [("jobs", "gobs"), ("events", "gvents"), ("changed_why", "changed_whx")])
def test_a_flipped_bit_in_a_definition_is_found_when_a_session_begins(
    local: LocalProject, name: str, other: str
) -> None:
    local.train(2).end()
    connection = sqlite3.connect(local.project.queue_db)
    with connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE type = 'trigger'", (name, other))
        assert connection.total_changes
    connection.close()
    with pytest.raises(QueueError, match="mbqueue recover"), Queue(local.project.queue_db) as queue:
        queue.verify()


def test_statistics_of_a_database_browser_do_not_count_as_damage(local: LocalProject, tmp_path: Path) -> None:
    local.train(1).end()
    with closing(sqlite3.connect(local.project.queue_db)) as browser:
        browser.execute("ANALYZE")
        assert browser.execute("SELECT count(*) FROM sqlite_stat1").fetchone()[0]
    with Queue(local.project.queue_db, read_only=True) as queue:
        queue.verify()
    back_up(local.project, tmp_path / "backup.tar", clock=local.clock)
    elsewhere = init_project(tmp_path / "elsewhere")[0]
    restore(elsewhere, tmp_path / "backup.tar", force=False, note=note, clock=local.clock)
    with Queue(elsewhere.queue_db, read_only=True) as queue:
        queue.verify()


def test_a_queue_that_restore_would_refuse_is_not_backed_up(local: LocalProject, tmp_path: Path) -> None:
    local.train(1).end()
    with closing(sqlite3.connect(local.project.queue_db)) as other, other:
        other.execute("CREATE TABLE of_another_program (x)")
    with pytest.raises(DamagedSnapshot, match="and views of a queue") as raised:
        back_up(local.project, tmp_path / "backup.tar", clock=local.clock)
    assert list(tmp_path.glob("*backup*")) == []
    assert list(causes(raised.value)) == []


def test_an_archive_that_reads_back_differently_is_not_kept(
    local: LocalProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.train(1).end()

    def flipped(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        add(archive, name, content if name != "queue.db" else bytes([content[0] ^ 1]) + content[1:])

    add = archive_module._add
    monkeypatch.setattr(archive_module, "_add", flipped)
    with pytest.raises(DamagedArchive, match="checksums"):
        back_up(local.project, tmp_path / "backup.tar", clock=local.clock)
    assert list(tmp_path.glob("*backup*")) == []


def test_a_backup_taken_during_a_session_restores_elsewhere_and_resumes(local: LocalProject, tmp_path: Path) -> None:
    session = local.train(3)
    made = back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    assert made.commits >= 1
    session.end()
    other = init_project(tmp_path / "other")[0]
    restore(other, tmp_path / "b.tar", force=False, note=note, clock=local.clock)
    carried = SteppedSession(other.root, other.live, local.clock)
    while carried.step():
        local.clock.advance(1.0)
    assert is_done(carried.queue)
    assert carried.steps_trained == 5, "a step that was in the backup was done again"


def test_what_restore_replaces_is_kept(local: LocalProject, tmp_path: Path) -> None:
    local.train(2).end()
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    local.train(2).end()
    restore(local.project, tmp_path / "b.tar", force=True, note=note, clock=local.clock)
    assert list(local.project.state_dir.glob("queue.db.replaced-*"))
    assert list(local.project.state_dir.glob("replaced-*/checkpoints/tiny/fold_0/*.pt"))


def test_what_commands_replace_within_one_second_is_kept_too(local: LocalProject, tmp_path: Path) -> None:
    local.train(2).end()
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    local.train(2).end()
    newer = local.project.queue_db.read_bytes()
    for _ in range(2):
        restore(local.project, tmp_path / "b.tar", force=True, note=note, clock=local.clock)
    recover(local.project, force=True, note=note, clock=local.clock)
    aside = sorted(local.project.state_dir.glob("queue.db.replaced-*"))
    queues = [path for path in aside if not path.name.endswith(("-wal", "-shm"))]
    assert len(queues) == 3
    assert queues[0].read_bytes() == newer
    first, second = sorted(path for path in local.project.state_dir.glob("replaced-*") if path.is_dir())
    for folder in (first, second):
        assert list(folder.glob("checkpoints/tiny/fold_0/*.pt"))
        assert not list(folder.glob("*/wanted"))


def test_after_an_interrupted_restore_only_restore_makes_a_queue(
    local: LocalProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a backup.tar"
    local.train(3).end()
    back_up(local.project, archive, clock=local.clock)
    rows = epochs_and_rows(local.project)
    local.train(2).end()

    def cut_off(*_arguments: object) -> None:
        raise OSError(5, "injected")

    with monkeypatch.context() as patched:
        patched.setattr("mbqueue.drive.archive._put_in_place", cut_off)
        with pytest.raises(OSError, match="injected"):
            restore(local.project, archive, force=True, note=note, clock=local.clock)
    again = f"mbqueue restore '{archive}'"
    with pytest.raises(UsageError, match=again):
        require_queue(local.project)
    with pytest.raises(UsageError, match=again):
        Project(local.project.root).enqueue("full_finetune", dataset="sample")
    with pytest.raises(UsageError, match=again):
        recover(local.project, force=False, note=note, clock=local.clock)
    with monkeypatch.context() as patched:
        patched.setenv("MBQUEUE_QUEUE", "postgresql://me@host/db")
        with pytest.raises(UsageError, match=f"MBQUEUE_QUEUE=sqlite {again}, then move the queue"):
            require_no_cut_off_restore(Project(local.project.root).folder)
        with pytest.raises(UsageError, match="MBQUEUE_QUEUE=sqlite"):
            Project(local.project.root).restore(archive)
    assert not local.project.queue_db.exists()
    monkeypatch.setenv("MBQUEUE_QUEUE", "sqlite")
    Project(local.project.root).restore(archive)
    assert epochs_and_rows(local.project) == rows
    require_queue(local.project)
    for path in local.project.state_dir.glob("queue.db*"):
        path.unlink()
    with pytest.raises(QueueLost, match="mbqueue recover"):
        require_queue(local.project)


RUNS = 'session = "1h"\nend_command = "rm -rf /"\n[notify]\nwebhook = "https://elsewhere/"\n'


@pytest.mark.parametrize(
    ("archived", "there", "is_put_in_place"),
    [
        (RUNS, 'session = "2h"\n', False),
        ("end_command = 3\n", 'session = "2h"\n', False),
        (RUNS, RUNS.replace("1h", "2h"), True),
        ('session = "1h"\n', RUNS, True),
    ],
    ids=["other commands", "not readable", "the same commands", "no commands"],
)
def test_an_archive_with_other_commands_does_not_replace_the_settings(
    local: LocalProject, tmp_path: Path, archived: str, there: str, is_put_in_place: bool
) -> None:
    local.train(1).end()
    settings = local.project.root / "mbqueue.toml"
    settings.write_text(archived)
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    settings.write_text(there)
    told: list[str] = []
    restore(local.project, tmp_path / "b.tar", force=True, note=told.append, clock=local.clock)
    assert settings.read_text() == (archived if is_put_in_place else there)
    beside = settings.with_name("mbqueue.toml.restored")
    assert beside.exists() != is_put_in_place
    assert any(str(beside) in text for text in told) != is_put_in_place


def rewritten(source: Path, change: Callable[[tarfile.TarInfo, bytes], list[tuple[tarfile.TarInfo, bytes]]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(source) as old, tarfile.open(fileobj=stream, mode="w") as new:
        for member in old:
            found = old.extractfile(member)
            assert found is not None
            for info, content in change(member, found.read()):
                info.size = len(content) if info.isreg() else 0
                new.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _extra(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[Path], bytes]:
    def build(source: Path) -> bytes:
        def change(member: tarfile.TarInfo, content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
            if member.name != "queue.db":
                return [(member, content)]
            extra = tarfile.TarInfo(name)
            extra.type, extra.linkname = kind, link
            return [(extra, b"evil"), (member, content)]

        return rewritten(source, change)

    return build


def _flipped(source: Path) -> bytes:
    content = bytearray(source.read_bytes())
    content[content.index(b"lineage")] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda source: source.read_bytes()[: source.read_bytes().rindex(b'checksums.json') + 700],
        lambda source: source.read_bytes()[: source.stat().st_size // 2],
        lambda _source: b"",
        lambda _source: b"not a tar file" * 1000,
        _flipped,
        _extra("../outside"),
        _extra("/tmp/outside"),
        _extra("jobs/../../outside.toml"),
        _extra("jobs/link.toml", tarfile.SYMTYPE, "/etc/passwd"),
        _extra("jobs/hard.toml", tarfile.LNKTYPE, "queue.db"),
        _extra("jobs/fifo.toml", tarfile.FIFOTYPE),
        _extra("jobs/unlisted.toml"),
        _extra("queue.db"),
    ],
    ids=[
        "tail cut", "half", "empty", "no tar", "flipped", "parent", "absolute", "parent inside", "symlink", "hard link",
        "fifo", "unlisted", "twice",
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_archive_is_refused_and_nothing_is_changed(
    local: LocalProject, tmp_path: Path, harm: Callable[[Path], bytes]
) -> None:
    local.train(3).end()
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    (tmp_path / "evil.tar").write_bytes(harm(tmp_path / "b.tar"))
    shutil.copytree(local.project.root, tmp_path / "copy")

    def everything(root: Path) -> dict[str, bytes]:
        paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {str(path.relative_to(root)): path.read_bytes() for path in paths}

    with pytest.raises(DamagedArchive, match="Nothing was changed"):
        restore(local.project, tmp_path / "evil.tar", force=True, note=note, clock=local.clock)
    assert everything(local.project.root) == everything(tmp_path / "copy")
    assert not (tmp_path / "outside").exists()
    assert not Path("/tmp/outside").exists()


def test_an_archive_cut_off_anywhere_is_reported_as_cut_off(local: LocalProject, tmp_path: Path) -> None:
    local.train(2).end()
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    back_up(local.project, whole, clock=local.clock)
    content = whole.read_bytes()
    for length in (700, 5000, len(content) // 2, content.rindex(b"checksums.json") + 100, len(content) - 20000):
        cut.write_bytes(content[:length])
        with pytest.raises(
            DamagedArchive, match=r"cut\.tar is not a complete backup: it (is cut off|ends too early).*; copy it again"
        ):
            restore(local.project, cut, force=True, note=note, clock=local.clock)


def test_a_backup_of_a_split_project_restores_into_a_local_one(tmp_path: Path, clock: ManualClock) -> None:
    root = init_project(tmp_path / "drive")[0].root
    split = ProjectFolder(root, Settings(), tmp_path / "live")
    split.live_dir.mkdir()
    with Queue(split.queue_db) as queue:
        queue.enqueue(tiny_spec(folds=(0,)), results_dir=RESULTS, now=clock.now())
    session = SteppedSession(root, split.live_dir, clock)
    for _ in range(20):
        session.step()
    assert is_done(session.queue)
    back_up(split, tmp_path / "b.tar", clock=clock)
    project = init_project(tmp_path / "local")[0]
    restore(project, tmp_path / "b.tar", force=False, note=note, clock=clock)
    with Queue(project.queue_db) as queue:
        assert is_done(queue)
    assert (project.root / RESULTS / "results.json").exists()
