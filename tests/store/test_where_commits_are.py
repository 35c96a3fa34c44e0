"""The queue knows where its commits are: a session that would read or write them elsewhere is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, faulty
from small_project import make_project, small_spec

from mbqueue.api import Project
from mbqueue.buckets import STORE_VARIABLE
from mbqueue.objects import ObjectStore
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue.opening import open_queue


def done(project: ProjectFolder, *, jobs: int, **result: Any) -> None:
    """Enqueue a small experiment, and do its first jobs on paper only."""
    spec = small_spec(project)
    with open_queue(project) as queue:
        queue.enqueue(spec, results_dir=project.results_folder("2026-01-01", spec.folder_name), now=1.0)
        session = queue.start_session(device="cpu", now=2.0, alive_seconds=60)
        for _ in range(jobs):
            lease = queue.claim(session, now=2.0, lease_seconds=60)
            assert lease is not None
            queue.commit(lease, result={"dataset_hash": "d" * 64, "seconds": 1.0, **result}, now=2.0)
        queue.end_session(session, reason="test", now=3.0)


def test_an_empty_variable_does_not_switch_the_store_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path).root
    with (root / "mbqueue.toml").open("a") as settings:
        settings.write('store = "s3://bucket/prefix"\n')
    monkeypatch.setenv(STORE_VARIABLE, "")
    assert find_project(root).store == "s3://bucket/prefix"


def test_a_retry_while_the_store_is_away_is_done_and_remembered(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, backend = faulty(s3.new_store())
    monkeypatch.setenv(STORE_VARIABLE, store.url)
    monkeypatch.setattr(ObjectStore, "open", classmethod(lambda _cls, _url: store))
    project = Project(make_project(tmp_path).root)
    done(project.folder, jobs=4, files={"predictions_fold_0.csv": {"size": 1, "sha256": "0" * 64}})
    assert project.cancel("full_finetune") == 1
    wanted = project.folder.wanted_dir / "full_finetune.json"
    assert json.loads(wanted.read_text())["cancelled"]
    backend.away = True
    with caplog.at_level(logging.WARNING):
        assert project.retry("full_finetune") == 1, "what was predicted is not predicted again"
    assert "could not be seen" in caplog.text
    assert not json.loads(wanted.read_text())["cancelled"], "a queue that is rebuilt would not forget it"
