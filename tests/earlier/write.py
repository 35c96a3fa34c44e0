"""Writes files.tar.xz beside itself: what a user of the version at commit 63f7668 has in the middle of an experiment.

It was run once, with the code and the test support of that commit, and is kept to say how the files were made:

    git worktree add ../earlier 63f7668
    PYTHONPATH=../earlier:tests/support:../earlier/tests/support python tests/earlier/write.py

``pretrained_infer`` is recorded; ``head_finetune`` has its first epoch and two steps of the second in fold 0, nothing
in fold 1. The commits' checkpoints are the same bytes in every part:

    sqlite/       a project with its queue in a file; a session of it was killed as it began its job
    postgresql/   one with its queue on a server: the project's folder, and dump.sql
    drive/        one on a drive, where two sessions that knew nothing of each other resumed from one commit
    store/        one with its commits in a bucket: the project's folder, and what is in the bucket
    archive/      what `mbqueue backup` made of the first
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import earlier_files
import torch
from moto.server import ThreadedMotoServer
from postgres_server import PostgresServer, binaries
from s3_server import ENVIRONMENT

from mbqueue.api import Project
from mbqueue.project import init_project
from mbqueue.session.report import Report
from mbqueue.session.stop import StopRequest
from mbqueue.storage.objects import ObjectStore

SETTINGS = "checkpoint_minutes = 1e-6\nlease_seconds = 60.0\n"
SCHEMA = "earlier"
STORE = "s3://earlier/mbqueue/project"
SMALL = {"data.limit": 20, "train.batch_size": 4}


class _StopAt(Report):
    """Ends the session after some step of the second epoch."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        self._step, self._stop = step, stop

    def advanced(self, job: object, what: str, done: int, *_rest: object) -> None:
        if what == "step" and getattr(job, "epoch", None) == 2 and done >= self._step:
            self._stop.request("SIGTERM")


class _Killed(Report):
    """Kills the process when a job begins."""

    def job_started(self, job: object) -> None:
        os.kill(os.getpid(), 9)


def new_project(root: Path) -> Path:
    """A project with both experiments in its queue; the first is recorded, and the second's first epoch trained."""
    init_project(root)
    (root / "mbqueue.toml").write_text(SETTINGS, encoding="utf-8")
    project = Project(root)
    project.enqueue("pretrained_infer", folds=[0, 1], dataset="sample", settings={"data.limit": 20})
    project.work(device="cpu")
    project.enqueue("head_finetune", folds=[0, 1], epochs=2, dataset="sample", settings=SMALL)
    project.work(device="cpu", max_jobs=2)
    return root


def train_to(root: Path, step: int) -> None:
    """Train fold 0 up to a step of its second epoch."""
    stop = StopRequest()
    Project(root).work(device="cpu", report=_StopAt(step, stop), stop=stop)


def keep(root: Path, target: Path) -> None:
    """Copy what is not made again."""
    made_again = shutil.ignore_patterns("cache", "*.lock", "*.db-shm", "logs")
    shutil.copytree(root, target, ignore=made_again, dirs_exist_ok=True)


def killed(root: Path) -> None:
    """Let a session die as it begins its job."""
    assert subprocess.run([sys.executable, __file__, str(root)], check=False).returncode == -9


def in_a_file(work: Path, files: Path) -> None:
    root = new_project(work / "sqlite")
    train_to(root, 2)
    (files / "archive").mkdir(parents=True)
    Project(root).back_up(files / "archive" / "backup.tar")
    killed(root)
    keep(root, files / "sqlite")


def on_a_server(work: Path, files: Path) -> None:
    server = PostgresServer()
    os.environ["MBQUEUE_QUEUE"] = server.url(schema=SCHEMA)
    try:
        root = new_project(work / "postgresql")
        train_to(root, 2)
        killed(root)
        address = os.environ["MBQUEUE_QUEUE"].partition("?")[0]
        dump = [str(binaries() / "pg_dump"), "--inserts", "--no-owner", "--schema", SCHEMA, address]
        said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        keep(root, files / "postgresql" / "project")
        # Commands of psql, which a driver does not know.
        (files / "postgresql" / "dump.sql").write_text(re.sub(r"(?m)^\\.*\n", "", said), encoding="utf-8")
    finally:
        del os.environ["MBQUEUE_QUEUE"]
        server.remove()


def on_a_drive(work: Path, files: Path) -> None:
    drive = work / "drive"
    os.environ["MBQUEUE_LIVE_DIR"] = str(work / "live-one")
    try:
        new_project(drive)
        shutil.copytree(drive, work / "drive-of-another-machine")
        train_to(drive, 2)
        os.environ["MBQUEUE_LIVE_DIR"] = str(work / "live-two")
        train_to(work / "drive-of-another-machine", 1)
    finally:
        del os.environ["MBQUEUE_LIVE_DIR"]
    # What either wrote reaches the drive in the end; no file of theirs has the name of another.
    keep(work / "drive-of-another-machine", files / "drive")
    keep(drive, files / "drive")


def in_a_bucket(work: Path, files: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}", MBQUEUE_STORE=STORE)
    try:
        bucket = f"http://{host}:{port}/{STORE.split('/')[2]}"
        urllib.request.urlopen(urllib.request.Request(bucket, method="PUT")).close()
        root = new_project(work / "store")
        train_to(root, 2)
        killed(root)
        store = ObjectStore.open(STORE)
        for name in store.names(""):
            target = files / "store" / "bucket" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.read(name, at_most=1 << 30))
        keep(root, files / "store" / "project")
        shutil.rmtree(files / "store" / "project" / "state" / "checkpoints")  # copies of what is in the bucket
    finally:
        del os.environ["MBQUEUE_STORE"]
        server.stop()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work, files = Path(folder), Path(folder) / "files"
        for part in (in_a_file, on_a_server, on_a_drive, in_a_bucket):
            part(work, files)
        earlier_files.pack(files)


if __name__ == "__main__":
    if sys.argv[1:]:
        Project(sys.argv[1]).work(device="cpu", report=_Killed())
    else:
        main()
