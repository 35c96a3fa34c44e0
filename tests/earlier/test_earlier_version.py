"""What the version at commit 63f7668 left in the middle of an experiment opens, resumes, and ends with the same bytes.

The files are described in write.py beside this. Bytes may differ between types of processor, so each is compared with
what the same code on the same machine makes of the same commits in a plain local project.
"""

from __future__ import annotations

import io
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import earlier_files
import pandas as pd
import pytest
import torch
from postgres_server import PostgresServer
from processes import outcome
from s3_server import S3Server
from small_project import RememberedReport

from mbqueue.api import Project
from mbqueue.buckets import STORE_VARIABLE
from mbqueue.project import init_project
from mbqueue.queue.postgresql import server as server_module
from mbqueue.storage.objects import ObjectStore
from mbqueue.topology import LIVE_VARIABLE, QUEUE_VARIABLE

STORE = "s3://earlier/mbqueue/project"
SCHEMA = "earlier"
FOLDS = (0, 1)
#: Settings that include the loss that head_finetune.toml used in that version.
SMALL = {"data.limit": 20, "train.batch_size": 4, "train.huber_delta": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as they were."""
    folder = tmp_path_factory.mktemp("earlier")
    earlier_files.unpack(folder)
    return folder


def ends(project: Project) -> dict[str, Any]:
    """Work until nothing is left; what both experiments came to."""
    report = RememberedReport()
    done = project.work(device="cpu", report=report)
    assert done.ending.name == "DONE", report.lines
    wrong = [line for line in report.lines if "failed" in line or "damaged" in line or "aside" in line]
    assert wrong == []
    found: dict[str, Any] = {"started": [line for line in report.lines if line.endswith(": started")]}
    for name in ("head_finetune", "pretrained_infer"):
        recorded = project.results(name)
        assert recorded.is_complete
        found[name] = [outcome(recorded.folder, fold) for fold in FOLDS], recorded.content["summary"]
    return found


def from_commits_alone(earlier: Path, root: Path, *, frozen: Path | None = None) -> dict[str, Any]:
    """What a new project in a local folder comes to that has the commits, and the stored frozen outputs if given."""
    project, _ = init_project(root)
    (project.root / "mbqueue.toml").write_text("checkpoint_minutes = 60.0\n")
    api = Project(project.root)
    api.enqueue("pretrained_infer", folds=FOLDS, dataset="sample", settings={"data.limit": 20})
    api.enqueue("head_finetune", folds=FOLDS, epochs=2, dataset="sample", settings=SMALL)
    shutil.copytree(earlier / "sqlite" / "state" / "checkpoints", project.all_checkpoints)
    for path in frozen.rglob("*.npy") if frozen is not None else ():
        kind, shard, _ = path.stem.split("-")
        folder = project.cache_dir / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{kind}-{shard}.npy")
        shutil.copyfile(path.with_name(f"{kind}-{shard}.json"), folder / f"{kind}-{shard}.json")
    return ends(api)


@pytest.fixture(scope="module")
def plain(earlier: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new project comes to that has nothing but the commits, in a local folder."""
    return from_commits_alone(earlier, tmp_path_factory.mktemp("plain"))


def require_same_weights(model: bytes, same_model: bytes) -> None:
    """The weights are equal; the references, which another type of processor fitted, to their last digits."""
    one, other = (
        torch.load(io.BytesIO(content), weights_only=True)["model"]["state_dict"] for content in (model, same_model)
    )
    assert one.keys() == other.keys()
    for name in one:
        is_fitted = name.startswith("composition_model.")
        torch.testing.assert_close(one[name], other[name], rtol=0.0, atol=1e-5 if is_fitted else 0.0)


def require_equal(found: dict[str, Any], plain: dict[str, Any]) -> None:
    assert found["head_finetune"] == plain["head_finetune"]
    # The earlier version predicted with the whole model. This version predicts from stored energies, so the last
    # digits differ.
    for (model, predicted, _), (same_model, same, _) in zip(
        found["pretrained_infer"][0], plain["pretrained_infer"][0], strict=True
    ):
        require_same_weights(model, same_model)
        one, other = (pd.read_csv(io.BytesIO(content)) for content in (predicted, same))
        pd.testing.assert_frame_equal(one, other, rtol=0.0, atol=1e-6)
    assert "head_finetune fold 0 epoch 2: started" in found["started"]
    again = [line for line in found["started"] if ("epoch 1" in line and "fold 0" in line) or "pretrained" in line]
    assert again == [], "what was done is done again"


def test_all_parts_have_the_same_commits(earlier: Path) -> None:
    """Or the comparisons below would compare different work."""
    for stem in ("e0001-done-f0001", "e0002-s000002-f0001"):
        same = {path.read_bytes() for path in earlier.rglob(f"{stem}*.pt")}
        assert len(list(earlier.rglob(f"{stem}*.pt"))) == 4
        assert len(same) == 1


def test_a_queue_in_a_file_resumes(earlier: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(earlier / "sqlite", tmp_path / "project")
    require_equal(ends(Project(tmp_path / "project")), plain)


def test_a_queue_on_a_server_resumes(
    earlier: Path,
    plain: dict[str, Any],
    tmp_path: Path,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    postgres_server.sql((earlier / "postgresql" / "dump.sql").read_text())
    monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url(schema=SCHEMA))
    # The tests' server has just started, but a user's server has been running for longer than this.
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.0)
    shutil.copytree(earlier / "postgresql" / "project", tmp_path / "project")
    require_equal(ends(Project(tmp_path / "project")), plain)


def test_a_drive_with_two_lines_of_commits_resumes_with_the_further_one_and_keeps_the_other(
    earlier: Path, plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "drive"
    shutil.copytree(earlier / "drive", root)
    (other,) = (root / "state" / "checkpoints" / "head_finetune" / "fold_0").glob("e0002-s000001-*.pt")
    monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / "live"))
    require_equal(ends(Project(root)), plain)
    assert other.exists()


def test_a_project_with_its_commits_in_a_bucket_resumes(
    earlier: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The resumed project uses the store's frozen outputs, which a different type of processor may have computed. So
    # let `plain` use the same outputs.
    plain = from_commits_alone(earlier, tmp_path / "plain", frozen=earlier / "store" / "bucket" / "frozen")
    bucket = f"{s3.url}/{STORE.split('/')[2]}"
    urllib.request.urlopen(urllib.request.Request(bucket, method="PUT")).close()
    store, files = ObjectStore.open(STORE), earlier / "store" / "bucket"
    for path in files.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(files)), path.read_bytes())
    monkeypatch.setenv(STORE_VARIABLE, STORE)
    shutil.copytree(earlier / "store" / "project", tmp_path / "project")
    require_equal(ends(Project(tmp_path / "project")), plain)


@pytest.mark.parametrize("forget", [False, True], ids=["with its queue", "with the queue recovered"])
def test_an_archive_is_restored_and_resumes(earlier: Path, plain: dict[str, Any], tmp_path: Path, forget: bool) -> None:
    project = Project(init_project(tmp_path / "project")[0].root)
    project.restore(earlier / "archive" / "backup.tar")
    if forget:
        project.folder.queue_db.unlink()
        project.recover()
    found = ends(project)
    if forget:  # the predict and record jobs run again
        found["started"] = [line for line in found["started"] if "pretrained" not in line]
    require_equal(found, plain)
