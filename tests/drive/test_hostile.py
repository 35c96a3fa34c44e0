"""Files with correct checksums but wrong content are skipped wherever they are read."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import ManualClock
from stepped_session import LocalProject

from mbqueue import files
from mbqueue.drive.archive import DamagedArchive, back_up, restore
from mbqueue.drive.recovery import recover
from mbqueue.drive.snapshots import DamagedSnapshot, Snapshots, check, take
from mbqueue.errors import CheckpointError
from mbqueue.project import init_project
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue
from mbqueue.storage.manifest import Damaged, manifest_of
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import HIGHEST_FENCE
from mbqueue.train.state import deserialise


@pytest.fixture
def local(tmp_path: Path, clock: ManualClock) -> LocalProject:
    return LocalProject(tmp_path / "project", clock)


def changed(content: dict[str, Any], change: dict[str, Any]) -> bytes:
    """A manifest with changed values and a matching checksum."""
    other = {key: value for key, value in content.items() if key != "checksum"} | change
    return json.dumps(other | {"checksum": files.sha256_of_json(other)}).encode()


IMPOSSIBLE: list[dict[str, Any]] = [
    {"enqueued": {"x": 1}},
    {"enqueued": {"spec": {}, "results_dir": "results/x/y", "priority": 0, "enqueued_at": 1.0, "prepare": {}}},
    {"history": [{"epoch": 1}]},
    {"history": [{"epoch": 1, "val_mae": "abc"}]},
    {"history": [{"epoch": 1, "val_mae": 0.1, "seconds": "x"}]},
    {"history": []},
    {"epoch": 999_999_999},
    {"fence": HIGHEST_FENCE + 1},
    {"epoch_sessions": [1]},
    {"epoch_seconds": 10**400},
    {"fingerprint_changes": [1]},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_an_impossible_manifest_is_refused(local: LocalProject, change: dict[str, Any]) -> None:
    local.train(2).end()
    content = json.loads(next(local.project.all_checkpoints.glob("*/*/e0001-done-*.json")).read_bytes())
    assert manifest_of(changed(content, {}), source="the same").epoch == 1
    with pytest.raises(Damaged, match="has invalid values for"):
        manifest_of(changed(content, change), source="another")


def test_recover_skips_an_impossible_manifest(local: LocalProject) -> None:
    local.train(4).end()
    path = max(local.project.checkpoints_dir("tiny", 0).glob("e*.json"))
    path.write_bytes(changed(json.loads(path.read_bytes()), {"enqueued": {"x": 1}}))
    local.project.queue_db.unlink()
    told: list[str] = []
    recover(local.project, force=False, note=told.append, clock=local.clock)
    assert any(path.name in text and "is skipped" in text for text in told)
    with Queue(local.project.queue_db, read_only=True) as queue:
        assert queue.jobs(fold=0)


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE jobs SET result = '{' WHERE kind = 'prepare'",
        "UPDATE jobs SET result = '[1]' WHERE kind = 'prepare'",
        "UPDATE jobs SET progress = '[1]' WHERE kind = 'predict'",
        "UPDATE jobs SET error = CAST(x'ff' AS TEXT)",
        "UPDATE jobs SET fence = 9223372036854775807 WHERE kind = 'predict'",
        f"UPDATE jobs SET fence = {HIGHEST_FENCE + 1} WHERE kind = 'predict'",
        "UPDATE jobs SET changed_at = 9e999",
        "UPDATE jobs SET priority = 4294967296",
        "UPDATE sessions SET alive_until = -1.0",
        "UPDATE events SET to_state = 'eaten'",
    ],
)
def test_a_snapshot_with_a_row_that_would_break_its_reader_is_refused(local: LocalProject, harm: str) -> None:
    local.train(1).end()
    copy = local.project.root / "copy.db"
    take(local.project.queue_db, copy)
    check(copy)
    connection = sqlite3.connect(copy)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    with connection:
        assert connection.execute(harm).rowcount
    connection.close()
    with pytest.raises(DamagedSnapshot):
        check(copy)


@pytest.mark.parametrize("change", [{"number": 2_147_483_648}, {"number": 7}, {"ancestry": {"00000000": 10**8}}])
def test_a_snapshot_whose_manifest_and_name_differ_in_number_is_refused(
    tmp_path: Path, local: LocalProject, change: dict[str, Any]
) -> None:
    root = init_project(tmp_path / "drive")[0].root
    fields = {"number": 1, "database": "12345678", "ancestry": {}, "session": "", "taken_at": 1.0, "last_event": 1}
    told: list[str] = []
    snapshots = Snapshots(Drive(root), lambda path, why: told.append(f"{path}: {why}"))
    take(local.project.queue_db, tmp_path / "copy.db")
    made = snapshots.publish(tmp_path / "copy.db", {**fields, "experiments": []})
    assert Snapshots(Drive(root)).listed()
    text = json.dumps(json.loads((root / f"{made.base}.json").read_bytes()) | change).encode()
    path = root / "state/snapshots" / f"00000001-12345678-{hashlib.sha256(text).hexdigest()[:12]}.json"
    (root / f"{made.base}.json").unlink()
    path.write_bytes(text)
    assert Snapshots(Drive(root), lambda path, why: told.append(f"{path}: {why}")).listed() == []
    assert "snapshot" in told[0]


def test_a_copy_that_the_drive_renamed_serves_for_a_cut_off_snapshot(tmp_path: Path, local: LocalProject) -> None:
    root = init_project(tmp_path / "drive")[0].root
    fields = {"number": 1, "database": "12345678", "ancestry": {}, "session": "", "taken_at": 1.0, "last_event": 1}
    take(local.project.queue_db, tmp_path / "copy.db")
    made = Snapshots(Drive(root)).publish(tmp_path / "copy.db", {**fields, "experiments": []})
    for suffix in (".json", ".db"):
        whole = root / f"{made.base}{suffix}"
        (root / f"{made.base} (2){suffix}").write_bytes(whole.read_bytes())
        for damaged in (whole, root / f"{made.base} (1){suffix}"):
            damaged.write_bytes(whole.read_bytes()[:100])
    told: list[str] = []
    snapshots = Snapshots(Drive(root), lambda path, why: told.append(f"{path}: {why}"))
    assert snapshots.fetch_newest(tmp_path / "fetched.db") == made
    assert (tmp_path / "fetched.db").read_bytes() == (tmp_path / "copy.db").read_bytes()
    assert [line.split(": ")[0] for line in told] == [f"{made.base} (1).json"]
    (tmp_path / "fetched.db").unlink()
    (root / f"{made.base} (2).db").write_bytes(b"cut off")
    assert snapshots.fetch_newest(tmp_path / "fetched.db") is None
    assert not (tmp_path / "fetched.db").exists()
    assert "bytes" in told[1]


def test_an_archive_bomb_is_refused_before_anything_is_unpacked(
    local: LocalProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "jobs.toml").open("wb") as stream:
        stream.truncate(64 << 20)
    bomb = tmp_path / "bomb.tar"
    command = ["tar", "--sparse", "--format=gnu", "--transform=s,^,jobs/,", "-cf", bomb, "-C", tmp_path, "jobs.toml"]
    subprocess.run(command, check=True)
    assert bomb.stat().st_size < 1 << 20
    laid: list[Path] = []
    monkeypatch.setattr(files, "write_bytes", lambda path, _content: laid.append(path))
    with pytest.raises(DamagedArchive, match="Nothing was changed"):
        restore(local.project, bomb, force=True, note=lambda _text: None, clock=local.clock)
    assert laid == []


def test_a_checkpoint_bomb_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"model": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(packed.getvalue()) < 1 << 16
    monkeypatch.setattr(torch, "load", lambda *_arguments, **_options: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="compressed"):
        deserialise(packed.getvalue())


def test_restore_accepts_an_archive_that_backup_wrote(local: LocalProject, tmp_path: Path) -> None:
    local.train(3).end()
    back_up(local.project, tmp_path / "b.tar", clock=local.clock)
    restore(local.project, tmp_path / "b.tar", force=True, note=lambda _text: None, clock=local.clock)
    with Queue(local.project.queue_db, read_only=True) as queue:
        assert any(job.state is State.COMMITTED for job in queue.jobs() if job.kind is Kind.TRAIN)
