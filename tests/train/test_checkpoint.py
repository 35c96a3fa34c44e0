"""When a commit exists, how it is verified, and how long it is kept."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from kept_commits import Kept, small_commits
from s3_server import new_store

from mbqueue.errors import CheckpointError, LeaseLost
from mbqueue.files import sha256_of_json
from mbqueue.storage.manifest import Damaged, Manifest, Rank, manifest_of
from mbqueue.storage.own_commits import Staged
from mbqueue.train.state import TrainState, deserialise


@pytest.fixture(scope="module")
def trained(bench: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commits of a finished epoch and of an unfinished one."""
    folder = tmp_path_factory.mktemp("trained")
    run = bench.run(folder)
    helpers.train_epoch(run, 1)
    helpers.train_epoch(run, 2, stop_after=1, fence=2)
    return folder


@pytest.fixture(params=["local folder", "s3", "shared folder"])
def commits(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Kept:
    """The same commits in every kind of storage."""
    store = None
    if request.param != "local folder":
        store = new_store(request.param, request.getfixturevalue("s3"), tmp_path / "share")
    kept = Kept.at(tmp_path / "commits", store)
    kept.take(trained)
    return kept


@pytest.fixture
def local(trained: Path, tmp_path: Path) -> Path:
    """The same commits in a local folder."""
    kept = Kept.at(tmp_path / "commits", None)
    kept.take(trained)
    return kept.folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_commit_is_a_checkpoint_and_a_manifest_named_by_epoch_step_and_fence(commits: Kept) -> None:
    assert commits.names() == [
        "e0001-done-f0001.json",
        "e0001-done-f0001.pt",
        "e0002-s000001-f0002.json",
        "e0002-s000001-f0002.pt",
    ]


def test_a_manifest_contains_the_progress_and_history_of_its_commit(commits: Kept) -> None:
    content = json.loads(commits.read("e0002-s000001-f0002.json"))
    assert content["parent"] == "e0001-done-f0001"
    assert content["best"]["commit"] == "e0001-done-f0001"
    assert content["file"] == "e0002-s000001-f0002.pt"
    assert (content["epoch"], content["step"], content["steps_per_epoch"], content["complete"]) == (2, 1, 3, False)
    assert [row["epoch"] for row in content["history"]] == [1]
    assert content["size"] == len(commits.read(content["file"]))
    assert content["fingerprint"]["device_type"] == "cpu"


def test_a_checkpoint_holds_model_and_optimizer_and_little_else(commits: Kept) -> None:
    assert len(commits.read("e0001-done-f0001.pt")) < 5.5e6


@pytest.mark.parametrize("harm", ["truncate", "flip a byte", "remove", "replace the content"])
def test_a_damaged_commit_is_set_aside_and_the_one_before_is_taken(commits: Kept, harm: str) -> None:
    name = "e0002-s000001-f0002.pt"
    content = bytearray(commits.read(name))
    if harm == "truncate":
        commits.write(name, content[:1000])
    elif harm == "flip a byte":
        content[len(content) // 2] ^= 1
        commits.write(name, content)
    elif harm == "remove":
        commits.remove(name)
    else:
        commits.write(name, commits.read("e0001-done-f0001.pt"))
    told = []
    newest = commits.checkpoints(lambda stem, why: told.append((stem, why))).newest()
    assert newest is not None
    assert newest.base == "e0001-done-f0001"
    assert [stem for stem, _ in told] == ["e0002-s000001-f0002"]
    assert "e0002-s000001-f0002.json.damaged" in commits.names()
    assert "e0002-s000001-f0002.json" not in commits.names()


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[1]", '{"format": 1, "epoch": 2'])
def test_an_invalid_manifest_is_set_aside(commits: Kept, text: str) -> None:
    commits.write("e0002-s000001-f0002.json", text.encode())
    told: list[str] = []
    newest = commits.checkpoints(lambda stem, _why: told.append(stem)).newest()
    assert newest is not None
    assert newest.base == "e0001-done-f0001"
    assert len(told) == 1


def test_a_manifest_of_a_newer_format_is_an_error_and_stays_where_it_is(commits: Kept) -> None:
    name = "e0002-s000001-f0002.json"
    content = {**json.loads(commits.read(name)), "format": 9}
    content["checksum"] = sha256_of_json({key: value for key, value in content.items() if key != "checksum"})
    commits.write(name, json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="newer mbqueue"):
        commits.checkpoints().newest()
    assert name in commits.names()


def test_a_checkpoint_is_loaded_once_but_its_bytes_are_verified_at_each_read(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[TrainState] = []

    def remembering(content: bytes) -> TrainState:
        loaded.append(deserialise(content))
        return loaded[-1]

    monkeypatch.setattr("mbqueue.train.checkpoint.deserialise", remembering)
    commits = small_commits(local)
    newest = commits.newest()
    assert newest is not None
    assert commits.newest() == newest
    assert [state.epoch for state in loaded] == [1, 2]
    path = local / f"{newest.base}.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = commits.newest()
    assert before is not None
    assert before.base == "e0001-done-f0001"


def test_a_failing_file_system_does_not_make_a_commit_count_as_damaged(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path, *_how: object) -> bytes:
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Transport endpoint"):
        small_commits(local).newest()
    monkeypatch.undo()
    assert len(names(local)) == 4


def test_a_checkpoint_cannot_run_code(commits: Kept, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoints = commits.checkpoints()
    commit = checkpoints.newest()
    assert commit is not None
    fields = {key: value for key, value in vars(commit.manifest).items() if key not in {"size", "sha256"}}
    checkpoints.stage(pickle.dumps(Evil()), fields | {"fence": 9}).publish()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.manifest.fence == 2
    assert not (tmp_path / "owned").exists()


def test_a_staged_commit_does_not_exist_until_it_is_published(commits: Kept) -> None:
    checkpoints = commits.checkpoints()
    commit = checkpoints.newest()
    assert commit is not None
    content = checkpoints.checkpoint(commit)
    fields = {key: value for key, value in vars(commit.manifest).items() if key not in {"size", "sha256"}}
    staged = checkpoints.stage(content, fields | {"fence": 7})
    assert [found.fence for found in checkpoints.manifests()] == [1, 2]
    staged.publish()
    assert [found.fence for found in checkpoints.manifests()] == [1, 2, 7]
    staged.discard()
    assert [found.fence for found in checkpoints.manifests()] == [1, 2, 7]


def test_a_lost_lease_publishes_nothing_and_leaves_no_file(bench: Any, helpers: Any, local: Path) -> None:
    def lost(_staged: Staged) -> None:
        raise LeaseLost("another worker has it")

    before = names(local)
    with pytest.raises(LeaseLost):
        helpers.train_epoch(bench.run(local), 2, fence=3, save=lost)
    assert names(local) == before


def test_pruning_keeps_the_newest_two_and_their_best(commits: Kept) -> None:
    checkpoints = commits.checkpoints()
    [done, middle] = checkpoints.commits()
    content = checkpoints.checkpoint(middle)
    fields = {key: value for key, value in vars(middle.manifest).items() if key not in {"size", "sha256"}}
    for fence in (3, 4, 5):
        checkpoints.stage(content, fields | {"fence": fence}).publish()
    assert checkpoints.prune() == [middle.base, "e0002-s000001-f0003"]
    assert [found.stem for found in checkpoints.manifests()] == [
        done.base,
        "e0002-s000001-f0004",
        "e0002-s000001-f0005",
    ]


def test_of_two_commits_of_the_same_step_the_later_lease_counts(local: Path) -> None:
    def order(**fields: Any) -> Rank:
        return Manifest(**{**base, **fields}).rank

    base = vars(small_commits(local).manifests()[0])
    assert order(fence=2) > order(fence=1)
    assert order(complete=True, step=3) > order(complete=False, step=3, fence=9)
    assert order(epoch=2, complete=False, step=1) > order(epoch=1)


def test_only_epochs_up_to_the_asked_one_are_resumed_from(commits: Kept) -> None:
    newest = commits.checkpoints().newest(at_most_epoch=1)
    assert newest is not None
    assert newest.base == "e0001-done-f0001"


def test_a_manifest_with_one_changed_digit_is_damaged(local: Path) -> None:
    path = local / "e0002-s000001-f0002.json"
    content = json.loads(path.read_text())
    content["history"][0]["val_mae"] += 1e-9
    path.write_text(json.dumps(content))
    with pytest.raises(Damaged, match="checksum"):
        manifest_of(path.read_bytes(), source=str(path))


def test_a_checkpoint_whose_writer_died_before_its_manifest_had_a_name_is_swept_away(
    local: Path, trained: Path
) -> None:
    before = names(local)
    commits = small_commits(local)
    manifest = manifest_of((trained / "e0002-s000001-f0002.json").read_bytes(), source="trained")
    fields = {key: value for key, value in vars(manifest).items() if key not in {"size", "sha256"}}
    commits.stage((trained / "e0002-s000001-f0002.pt").read_bytes(), {**fields, "fence": 7})
    assert "e0002-s000001-f0007.pt" in names(local)
    (local / "e0001-done-f0001.pt.damaged").write_bytes(b"evidence")
    small_commits(local).sweep()
    assert names(local) == sorted([*before, "e0001-done-f0001.pt.damaged"])


def test_files_published_by_a_queue_in_a_file_are_neither_commits_nor_garbage(local: Path) -> None:
    """On a cluster's file system, both kinds of files are in state/checkpoints."""
    for suffix in (".json", ".pt"):
        content = (local / f"e0001-done-f0001{suffix}").read_bytes()
        (local / f"e0001-done-f0001-0123456789ab{suffix}").write_bytes(content)
    (local / "e0002-done-f0002-0123456789ab.pt").write_bytes(b"its manifest is on its way")
    before = names(local)
    commits = small_commits(local)
    commits.sweep()
    newest = commits.newest()
    assert newest is not None
    assert newest.base == "e0002-s000001-f0002"
    commits.prune()
    assert names(local) == before
